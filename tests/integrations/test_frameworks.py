"""Plug-ins of other frameworks, on stand-ins with the frameworks' recorded signatures.

`.ci/frameworks.py` holds the same signatures against the newest wheels of the real packages.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

import qkernels
from qkernels.integrations import log_softmax, patches


def stock_log_softmax(logits, index):
    """TRL's function, by its definition."""
    squeeze = index.ndim == logits.ndim - 1
    chosen = logits.log_softmax(-1).gather(-1, index.unsqueeze(-1) if squeeze else index)
    return chosen.squeeze(-1) if squeeze else chosen


def module(name: str, **contents) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(contents)
    return made


@pytest.fixture
def old_trl(monkeypatch):
    """TRL as it was before 1.16, and a package that has imported its function."""
    utils = module("trl.trainer.utils", selective_log_softmax=stock_log_softmax)
    user = module("swift.rlhf_trainers.rlhf_mixin", selective_log_softmax=stock_log_softmax)
    stranger = module("stranger", selective_log_softmax=stock_log_softmax)
    for made in (module("trl"), module("trl.trainer"), utils, module("swift"), user, stranger):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    return types.SimpleNamespace(utils=utils, user=user, stranger=stranger)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_softmax_equals_trl_s(dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(3, 5, 101)).to(dtype).requires_grad_()
    index = torch.randint(0, 101, (3, 5))
    ours = log_softmax.selective_log_softmax(logits, index, stock=stock_log_softmax)
    exact = stock_log_softmax(logits.detach().double(), index)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-6)  # fp32 of values up to about 15
    ours = ours * 1.0
    ours[:, 0] = 0  # as ms-swift does with masked positions
    upstream = torch.randn(3, 5)
    (gradient,) = torch.autograd.grad((ours * upstream).sum(), logits)
    wide = logits.detach().double().requires_grad_()
    masked = upstream.clone()
    masked[:, 0] = 0
    (expected,) = torch.autograd.grad((stock_log_softmax(wide, index) * masked).sum(), wide)
    bound = 4e-7 if dtype == torch.float32 else 2**-8
    assert (gradient.double() - expected).abs().max() <= bound * expected.abs().max()


def test_log_softmax_can_be_changed_in_place():
    logits = torch.randn(2, 3, 17, requires_grad=True)
    logps = log_softmax.selective_log_softmax(logits, torch.zeros(2, 3, dtype=torch.long), stock=stock_log_softmax)
    logps[torch.tensor([[True, False, False], [False] * 3])] = 0
    logps.sum().backward()
    assert (logits.grad[0, 0] == 0).all() and (logits.grad[0, 1] != 0).all()


def test_several_tokens_per_position_stay_with_trl():
    logits, index = torch.randn(2, 3, 11), torch.randint(0, 11, (2, 3, 4))
    ours = log_softmax.selective_log_softmax(logits, index, stock=stock_log_softmax)
    assert torch.equal(ours, stock_log_softmax(logits, index))


def test_patch_of_the_log_softmax(old_trl):
    with log_softmax.patch_log_softmax(("trl", "swift")):
        for patched in (old_trl.utils, old_trl.user):
            assert patched.selective_log_softmax.func is log_softmax.selective_log_softmax
        assert old_trl.stranger.selective_log_softmax is stock_log_softmax
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log_softmax.patch_log_softmax(("trl", "swift")).undo()  # a second time: nothing to do, nothing to say
        assert old_trl.utils.selective_log_softmax.func is log_softmax.selective_log_softmax
    assert old_trl.utils.selective_log_softmax is stock_log_softmax
    assert old_trl.user.selective_log_softmax is stock_log_softmax


def test_unknown_log_softmax_is_left_alone(old_trl):
    old_trl.utils.selective_log_softmax = unknown = lambda logits, index, mode: None
    with pytest.warns(UserWarning, match=r"log-probs stay TRL's own.*'mode'"):
        log_softmax.patch_log_softmax()
    assert old_trl.utils.selective_log_softmax is unknown


def test_ms_swift_plugin(old_trl, monkeypatch):
    """As ms-swift imports the file: by its path, under another name."""
    path = importlib.import_module("qkernels.integrations.ms_swift").__file__
    old_trl.utils.selective_log_softmax = old_trl.user.selective_log_softmax = stock_log_softmax
    spec = importlib.util.spec_from_file_location("_swift_external_1", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert old_trl.user.selective_log_softmax.func is log_softmax.selective_log_softmax


@pytest.mark.parametrize("version, fused", [("1.9.0", "log-probs"), ("1.16.0", "heads")])
def test_axolotl_plugin(version, fused, old_trl, monkeypatch):
    from qkernels.integrations import axolotl

    called = []
    monkeypatch.setattr(axolotl, "patch_log_softmax", lambda packages: called.append("log-probs"))
    monkeypatch.setattr(axolotl, "patch_trl", lambda: called.append("heads"))
    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "trl" else found(name))
    plugin = axolotl.QKernelsPlugin()
    plugin.pre_model_load({"rl": None})
    assert called == []  # supervised fine-tuning is left alone
    plugin.pre_model_load({"rl": "dpo"})
    assert called == [fused]


# --- verl ----------------------------------------------------------------------------------------------------------


class FusedLinearForPPO(torch.nn.Module):
    """verl's module, by its definition."""

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        logits = hidden_states @ vocab_weights.t() / temperature
        logps = logits.log_softmax(-1)
        return logps.gather(-1, input_ids.unsqueeze(-1)).squeeze(-1), -(logps.exp() * logps).sum(-1)


class LinearCrossEntropy:
    """verl's function, by its definition."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
        return FusedLinearForPPO().forward(hidden.flatten(0, -2), weight, labels.flatten(), temperature)

    @staticmethod
    def apply(*arguments):
        return LinearCrossEntropy.forward(None, *arguments)


STOCK_FORWARD = FusedLinearForPPO.forward


@pytest.fixture
def verl(monkeypatch):
    from qkernels.integrations.verl import heads, uninstall

    kernel = module(heads.TRITON, LinearCrossEntropy=LinearCrossEntropy, linear_cross_entropy=LinearCrossEntropy.apply)
    functional = module(heads.TORCH, FusedLinearForPPO=FusedLinearForPPO)
    for name in ("verl", "verl.utils", "verl.utils.kernel", "verl.utils.experimental"):
        monkeypatch.setitem(sys.modules, name, module(name))
    monkeypatch.setitem(sys.modules, heads.TRITON, kernel)
    monkeypatch.setitem(sys.modules, heads.TORCH, functional)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99")
    yield types.SimpleNamespace(kernel=kernel, functional=functional)
    uninstall()


def call(function, *arguments):
    """Results and gradients of a loss on both results."""
    hidden, weight, *rest = arguments
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps, entropy = function(hidden, weight, *rest)
    factors = torch.linspace(-1, 1, logps.numel()).reshape(logps.shape)
    return [logps, entropy, *torch.autograd.grad((logps * factors + 0.1 * entropy).sum(), (hidden, weight))]


def test_verl_heads_equal_verl_s(verl):
    from qkernels.integrations.verl import install, uninstall

    torch.manual_seed(1)
    hidden, weight, labels = torch.randn(2, 4, 16), torch.randn(53, 16), torch.randint(0, 53, (2, 4))
    module_of_verl = FusedLinearForPPO()
    stock = call(module_of_verl.forward, hidden, weight, labels, 0.7)
    stock_flat = call(verl.kernel.linear_cross_entropy, hidden, weight, labels, 0.7, "none")
    install()
    assert FusedLinearForPPO.forward is not STOCK_FORWARD
    ours = call(module_of_verl.forward, hidden, weight, labels, 0.7)
    ours_flat = call(verl.kernel.linear_cross_entropy, hidden, weight, labels, 0.7, "none")
    for one, other in zip(ours + ours_flat, stock + stock_flat, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    uninstall()
    assert FusedLinearForPPO.forward is STOCK_FORWARD
    assert verl.kernel.linear_cross_entropy is LinearCrossEntropy.apply


@pytest.mark.parametrize("value, installed", [(None, False), ("0", False), ("1", True)])
def test_verl_plugin_is_off_unless_asked_for(value, installed, verl, monkeypatch):
    if value is None:
        monkeypatch.delenv("QKERNELS_VERL", raising=False)
    else:
        monkeypatch.setenv("QKERNELS_VERL", value)
    monkeypatch.delitem(sys.modules, "qkernels.integrations.verl.plugin", raising=False)
    importlib.import_module("qkernels.integrations.verl.plugin")
    assert (FusedLinearForPPO.forward is not STOCK_FORWARD) == installed


def test_verl_plugin_is_an_entry_point():
    (entry,) = importlib.metadata.entry_points(group="verl.plugins", name="qkernels")
    assert entry.value == "qkernels.integrations.verl.plugin"


def test_verl_of_an_unknown_version_keeps_its_heads(verl, monkeypatch):
    from qkernels.integrations.verl import install

    monkeypatch.setattr(FusedLinearForPPO, "forward", changed := lambda self, hidden, weights, ids, scale, mask: None)
    with pytest.warns(UserWarning, match=r"verl 0\.99 keeps its own heads.*'mask'"):
        install()
    assert FusedLinearForPPO.forward is changed
    assert verl.kernel.linear_cross_entropy is LinearCrossEntropy.apply


def test_a_patch_is_undone_in_reverse():
    holder = module("holder", value=1)
    patch = patches.Patch()
    patch.set(holder, "value", 2)
    patch.set(holder, "value", 3)
    patch.undo()
    assert holder.value == 1


def test_the_command_line_of_trl_starts_ours(monkeypatch):
    """What accelerate is asked to run, and with which of TRL's classes replaced."""
    pytest.importorskip("trl", reason="TRL is not installed")
    trl = importlib.import_module("trl")
    launch = importlib.import_module("accelerate.commands.launch")
    from qkernels.cli import main

    seen = {}
    monkeypatch.setattr(launch, "launch_command", lambda args: seen.update(args=args, config=trl.DPOConfig))
    arguments = ["dpo", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--num_processes", "2",
                 "--use_cpu", "True", "--bf16", "False"]  # fmt: skip
    assert main(["trl", *arguments, "--loss_kwargs", "{}"]) == 0
    assert seen["args"].num_processes == 2 and seen["args"].module
    assert seen["args"].training_script == "qkernels.integrations.trl.command"
    assert seen["args"].training_script_args == [
        "dpo", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--use_cpu",
        "True", "--bf16", "False", "--loss_kwargs", "{}",
    ]  # fmt: skip
    assert seen["config"].__name__ == "TokenDPOConfig"
    assert trl.DPOConfig.__name__ == "DPOConfig"  # put back
    assert qkernels.__version__


@pytest.mark.parametrize("name", ["dpo", "kto", "sft"])
def test_training_by_the_command_line_of_trl(name, tmp_path, monkeypatch):
    """TRL's own script in this process, as a process of accelerate runs it."""
    pytest.importorskip("trl", reason="TRL is not installed")
    import json

    import hf_models
    from qkernels.integrations.trl import command, unpatch_trl

    monkeypatch.setenv("TQDM_DISABLE", "1")
    hf_models.model().save_pretrained(tmp_path / "model")
    hf_models.tokenizer().save_pretrained(tmp_path / "model")
    rows = hf_models.preferences()
    if name == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    elif name == "kto":
        sides = (("chosen", True), ("rejected", False))
        rows = [{"prompt": r["prompt"], "completion": r[side], "label": good} for r in rows for side, good in sides]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "data", "output_dir": tmp_path / "out",
        "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False,
        "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["trl", *(part for k, v in options.items() for part in (f"--{k}", str(v)))])
    made = []
    if name in command.OURS:
        trainer = getattr(importlib.import_module("qkernels.integrations.trl"), f"Token{name.upper()}Trainer")
        initial = trainer.__init__
        monkeypatch.setattr(trainer, "__init__", lambda self, **kw: (made.append(self), initial(self, **kw))[1])
    try:
        with patches.Patch() as patch:
            command._train(name, patch)
    finally:
        unpatch_trl()
    assert (tmp_path / "out" / "config.json").exists()
    assert len(made) == (name in command.OURS)


# --- the recipes of the documentation ------------------------------------------------------------------------------


def recipe(framework: str) -> str:
    """The Python block of a tab of docs/frameworks.md."""
    page = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text(encoding="utf-8")
    tab = page.split(f":::{{tab-item}} {framework}\n")[1].split("\n:::")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", tab, re.DOTALL | re.MULTILINE)
    return code


def stock_batch_logps(logits, labels, label_pad_token_id=-100, ld_alpha=None):
    """LLaMA-Factory's function, by its definition (ld_alpha: only that it is passed on)."""
    labels, logits = labels[:, 1:], logits[:, :-1]
    mask = labels != label_pad_token_id
    logps = stock_log_softmax(logits, labels.clamp(min=0)) * mask
    return logps.sum(-1) * (1 if ld_alpha is None else ld_alpha), mask.sum(-1)


def test_recipe_for_llama_factory(monkeypatch):
    """As its DPO trainer calls it, by keyword."""
    dpo = module("llamafactory.train.dpo.trainer", get_batch_logps=stock_batch_logps)
    kto = module("llamafactory.train.kto.trainer", get_batch_logps=stock_batch_logps)
    packages = ("llamafactory", "llamafactory.train", "llamafactory.train.dpo", "llamafactory.train.kto")
    for made in (*map(module, packages), dpo, kto):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    sys.modules["llamafactory.train.dpo"].trainer = dpo
    sys.modules["llamafactory.train.kto"].trainer = kto
    exec(compile(recipe("LLaMA-Factory"), "docs/frameworks.md", "exec"), {"__name__": "recipe"})
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 7, 31), torch.randint(0, 31, (4, 7))
    labels[:, :3] = -100
    for ld_alpha in (None, 0.5):
        for holder in (dpo, kto):
            ours = holder.get_batch_logps(logits=logits, labels=labels, ld_alpha=ld_alpha)
            for one, other in zip(ours, stock_batch_logps(logits, labels, ld_alpha=ld_alpha), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_recipe_for_openrlhf(monkeypatch):
    """As its actor calls it."""
    actor = module("openrlhf.models.actor", log_probs_from_logits=None)
    for made in (module("openrlhf"), module("openrlhf.models"), actor):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    sys.modules["openrlhf.models"].actor = actor
    exec(compile(recipe("OpenRLHF"), "docs/frameworks.md", "exec"), {"__name__": "recipe"})
    logits, labels = torch.randn(3, 5, 31), torch.randint(0, 31, (3, 5))
    torch.testing.assert_close(actor.log_probs_from_logits(logits, labels), stock_log_softmax(logits, labels))


def test_moved_hooks_are_named(tmp_path, capsys):
    """The comparison with wheels fails where a function has other parameters, and passes on the ones that are known."""
    import zipfile

    from bench import frameworks

    known = inspect.getsource(stock_log_softmax).replace("stock_log_softmax", "selective_log_softmax")
    for folder, source in (("known", known), ("moved", known.replace("(logits, index)", "(logits, index, mode=0)"))):
        (tmp_path / folder).mkdir()
        with zipfile.ZipFile(tmp_path / folder / "trl-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("trl/trainer/utils.py", source)
    assert frameworks.main(["--wheels", str(tmp_path / "known"), "--check"]) == 0
    assert frameworks.main(["--wheels", str(tmp_path / "moved"), "--check"]) == 1
    assert "trl-1.0 selective_log_softmax takes ('logits', 'index', 'mode')" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        frameworks.main(["--wheels", str(tmp_path / "nothing")])
