"""Tree search over completions: the tree and its rule of selection, the model that reads each of its tokens once."""
