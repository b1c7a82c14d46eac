"""The recipe of docs/score.md with Ray Data, on a cluster of this machine: its rows are those of `qkernels score`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from qkernels.score import ScoreOptions, run_score
from score_runs import BETA, ROOT, records, write_data

pytestmark = pytest.mark.nightly  # starting a cluster takes 15 seconds

DOCS = Path(__file__).parents[2] / "docs" / "score.md"
PAIRS = 70  # two batches


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_gives_the_rows_of_the_command(folders: Path, tmp_path: Path):
    (recipe,) = re.findall(r"^```python\n(import numpy as np\nimport ray\n.*?)^```", DOCS.read_text(), re.M | re.S)
    # A module, as a user would have it: what is pickled to the actors is found there.
    (tmp_path / "recipe.py").write_text(recipe)
    rows = records(PAIRS)
    pq.write_table(
        pa.Table.from_pylist([{"number": i, **row} for i, row in enumerate(rows)]), tmp_path / "pairs.parquet"
    )
    expected = tmp_path / "expected"
    run_score(ScoreOptions(str(folders / "policy"), write_data(tmp_path / "data.json", rows), expected,
                           reference=str(folders / "reference"), beta=BETA))  # fmt: skip
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}})  # fmt: skip
    try:
        namespace: dict = {"__name__": "recipe"}
        exec(compile(recipe, "docs/score.md", "exec"), namespace)
        models = [str(folders / name) for name in ("policy", "reference")]
        namespace["score_with_ray"](str(tmp_path / "pairs.parquet"), str(tmp_path / "out"), *models, BETA, 2)
    finally:
        ray.shutdown()
    found = pq.read_table(tmp_path / "out").to_pandas()
    wanted = pq.read_table(expected / "tokens.parquet").to_pandas()
    order = ["pair", "side", "position"]
    found, wanted = (table.astype({"side": str}).sort_values(order, ignore_index=True) for table in (found, wanted))
    assert len(found) == len(wanted)
    for name in wanted.columns:
        if wanted[name].dtype == np.float32:
            # One batch of an actor is the window of the command: the same numbers, up to another number of threads.
            np.testing.assert_allclose(found[name], wanted[name], atol=2e-5 * max(1, wanted[name].abs().max()))
        else:
            assert (found[name] == wanted[name]).all(), name
