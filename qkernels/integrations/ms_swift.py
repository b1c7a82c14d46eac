"""ms-swift: fused log-probs by one option of its command line.

    swift rlhf --rlhf_type dpo ... \\
        --external_plugins "$(python -c 'import qkernels.integrations.ms_swift as plugin; print(plugin.__file__)')"

ms-swift runs the file and so replaces `selective_log_softmax` in its trainers and in TRL's (see `log_softmax`).
Importing the module outside of ms-swift changes nothing.
"""

import sys

from qkernels.integrations.log_softmax import patch_log_softmax

if "swift" in sys.modules:
    patch_log_softmax(("trl", "swift"))
