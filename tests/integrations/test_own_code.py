"""A function is known again by what it computes: by itself, by what it calls and reads, and by nothing else."""

import dataclasses
import functools
import sys
from types import ModuleType

import pytest
import torch
from loop_helpers import CONFIG, run
from trl_helpers import build

from popsd.engine.chunks import registry
from popsd_integrations.own_code import code_fingerprint, is_own

SOURCE = """
import torch
import popsd_test_helper
SHARE = 2.0
WEIGHTS = torch.tensor([1.0, 2.0])

def helper(x):
    return SHARE * x

def target(base, teacher, reference, power=1.5):
    '''Says something.'''
    def inner(x):
        return x + 1
    # a comment
    return base + power * helper(teacher) - WEIGHTS * inner(popsd_test_helper.scaled(reference))
"""
HELPER = "def scaled(x):\n    return 3 * x\n\ndef unused(x):\n    return x\n"


def fingerprint(source=SOURCE, helper=HELPER):
    """Of the function ``target`` of a module, freshly imported beside another."""
    made = {}
    for name, text in (("popsd_test_helper", helper), ("popsd_test_target", source)):
        made[name] = module = ModuleType(name)
        module.__file__ = f"/somewhere/{name}.py"
        sys.modules[name] = module
        exec(compile(text, module.__file__, "exec"), vars(module))
    for name in made:
        del sys.modules[name]
    return code_fingerprint(made["popsd_test_target"].target)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base +", "base -"),
        ("power=1.5", "power=2.5"),
        ("SHARE = 2.0", "SHARE = 2.5"),
        ("SHARE * x", "SHARE + x"),
        ("x + 1", "x + 2"),
        ("[1.0, 2.0]", "[1.0, 2.5]"),
        ("scaled(", "unused("),
    ],
)
def test_a_change_of_what_is_computed_shows(old, new):
    assert old in SOURCE and fingerprint(SOURCE.replace(old, new)) != fingerprint()


def test_a_change_in_another_module_of_ones_own_shows():
    assert fingerprint(helper=HELPER.replace("3 * x", "4 * x")) != fingerprint()
    assert fingerprint(helper=HELPER.replace("return x\n", "return -x\n")) == fingerprint()  # nothing calls it


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Says something.", "Says more."),
        ("# a comment", "# another, and\n\n    # a line more"),
        ("def inner(x):\n        return x", "def inner(y):\n        return y"),
        ("def helper", "OTHER = 3\ndef helper"),
    ],
)
def test_nothing_else_shows(old, new):
    assert old in SOURCE and fingerprint(SOURCE.replace(old, new)) == fingerprint()


def test_closures_partials_and_objects_count_with_what_they_hold():
    def made(power):
        return lambda x: x * power

    class Scaled:
        def __init__(self, share):
            self.share = share

        def __call__(self, x):
            return self.share * x

    for of in (made, Scaled, lambda share: functools.partial(made(1), share)):
        assert code_fingerprint(of(1.5)) == code_fingerprint(of(1.5)) != code_fingerprint(of(2.5))
        assert is_own(of(1.5))


def test_what_is_installed_counts_by_name():
    from popsd import linear_jsd

    assert not any(map(is_own, (torch.softmax, torch.nn.functional.softmax, functools.partial(linear_jsd), len)))
    assert code_fingerprint(linear_jsd) != code_fingerprint(torch.nn.functional.softmax)


MODULE = """
import popsd

def mine(base, teacher, reference, share=2.0):
    return base + teacher - share * reference

some = popsd.TargetConfig(target="arithmetic_mix", numbers=(0.3,))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module, as it is found by a new process."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which is looked up by a time in whole seconds

    def write(text):
        (tmp_path / "popsd_test_edited.py").write_text(text)
        monkeypatch.delitem(sys.modules, "popsd_test_edited", raising=False)
        monkeypatch.setattr(registry, "_targets", {x: y for x, y in registry._targets.items() if "edited" not in x})

    return write


@pytest.mark.parametrize(("name", "old", "new"), [("mine", "share *", "share +"), ("some", "0.3", "0.4")])
def test_a_target_that_was_edited_is_not_resumed(tmp_path, module, name, old, new):
    """Neither by the trainer nor by the loop; some's numbers are no option of the run."""
    target = f"popsd_test_edited:{name}"

    def trainer(steps):
        return build(tmp_path / "trl", loss_target=target, max_steps=steps, save_strategy="steps", save_steps=1)

    def loop(steps, **options):
        run(tmp_path / "loop", dataclasses.replace(CONFIG, loss=None, loss_target=target, steps=steps), **options)

    module(MODULE)
    trainer(1).train()
    loop(1)
    module(MODULE.replace(old, new))
    for resumed in (lambda: trainer(2).train(resume_from_checkpoint=True), lambda: loop(2, resume=True)):
        with pytest.raises(ValueError, match=f"output_dir: .*code of loss_target '{target}'"):
            resumed()
    module("# the same\n" + MODULE)
    trainer(2).train(resume_from_checkpoint=True)
    loop(2, resume=True)
