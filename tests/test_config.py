"""Options: who wins over whom, what JSON keeps, and one sentence for every value that cannot be."""
import argparse
import json
from dataclasses import asdict, replace
from math import inf, nan

import pytest

import train
from tests.helpers import refused
from ucdr_ref.config import (
    FIELDS,
    MACHINE,
    PATHS,
    PRESETS,
    VARIANTS,
    Config,
    add_arguments,
    differences,
    flag_of,
    from_dict,
    parse,
    resolve,
)


def parsed(*flags: str) -> dict:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parse(parser, list(flags)))


def test_there_are_at_most_62_options_and_each_has_its_line_in_the_help(capsys):
    assert len(FIELDS) <= 62 and {*MACHINE, *PATHS} < set(FIELDS)
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    for group in ("The run, its images and its machine", "UCDR-Adapter", "SRE-CLIP"):
        assert f"\n{group}:\n" in text
    text = " ".join(text.split())
    assert all(f" {flag_of(name)} " in text for name in FIELDS)
    assert text.count("(default: ") >= len(FIELDS) and all(preset in text for preset in ("toy/fast", "domainnet/sketch"))


def test_flags_over_preset_and_variant_over_defaults():
    released = resolve({"variant": "released", "mask": "own", "prompt_length": 7}, "sketchy")
    assert (released.mask, released.prompt_length, released.feature_token, released.context_vectors) == ("own", 7, 1, 8)
    for preset, values in PRESETS.items():  # what neither preset, variant nor flag names is the default
        found = asdict(resolve({"target_lr": 0.5, "weights": "w"}, preset))
        assert found == {**asdict(Config()), **values, "target_lr": 0.5, "weights": "w"}, preset


def test_variants():
    for values in VARIANTS.values():
        assert asdict(from_dict(values)) == {**asdict(Config()), **values}
    for preset, classes in (("sketchy-random", "train+val"), ("domainnet/sketch", "train")):  # D10
        assert resolve({"variant": "released"}, preset).train_classes == classes
    assert resolve({"variant": "released"}).stroke_domains == ("sketch", "quickdraw") != Config.stroke_domains
    sre = resolve({"method": "sre-clip", "variant": "released"})
    assert sre.stroke_domains == () and sre.structure_pairs == "diagonal"  # D14 is not this method's


def test_presets_without_a_name():
    sre_clip = {"method": "sre-clip"}
    for flags, fast, preset in (({}, False, "toy"), ({}, True, "toy/fast"), ({"dataset": "sketchy-random"}, False, "sketchy-random"),
                                (sre_clip, False, "sre/toy"), (sre_clip, True, "sre/toy/fast"),
                                ({**sre_clip, "source": ["a"], "target": "b"}, False, "sre")):
        assert resolve(flags, fast=fast) == from_dict({**PRESETS[preset], **flags})
    assert resolve({"dataset": "domainnet", "held_out": "clipart"}).seen == ""  # the protocol's own, not a row's
    assert resolve({"method": "closed-form"}).dataset == "toy"
    for flags, preset, fast in (({}, "cats", False), ({"dataset": "domainnet"}, None, True), ({}, "tuberlin", True)):
        with pytest.raises(ValueError, match="no such preset; there are toy, toy/fast"):
            resolve(flags, preset, fast)


def test_flags_have_the_fields_types_and_leave_no_trace_when_absent():
    assert parsed() == {}
    given = parsed("--sre-lr", "0.1", "--seed", "3", "--stroke-domains", "a", "b", "--mask", "none", "--feature-token", "1")
    assert given == {"sre_lr": 0.1, "seed": 3, "stroke_domains": ["a", "b"], "mask": "none", "feature_token": 1}


def test_json_there_and_back():
    for config in (Config(), resolve({"variant": "released", "source": ["x", "y"]}, "sre"), resolve({"target_lr": 1e-7})):
        assert from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert type(from_dict({"target_lr": 1}).target_lr) is float


@pytest.mark.parametrize(("values", "sentence"), [
    ({"tao": 1.0}, "^tao: no option of this version"), ({None: 1, "x": 2}, "None, x: no option"),
    ({"mask": "theirs"}, "^--mask theirs: must be one of own, none"), ({"feature_token": 2}, "--feature-token 2: must be one of 0, 1"),
    ({"feature_token": True}, "--feature-token True: must be of type int"), ({"workers": 300}, "at least 0 and at most 256"),
    ({"target_lr": nan}, "--target-lr nan"), ({"target_lr": inf}, "--target-lr inf"), ({"target_lr": "1"}, "must be of type float"),
    ({"source": "folder"}, "--source folder: must be of type tuple"), ({"source": [1]}, r"--source \[1\]")])
def test_values_that_cannot_be(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_dict(values)


def test_every_number_has_a_range_which_is_closed(tmp_path, capsys):
    for name, (default, _, choices, (low, high)) in FIELDS.items():
        if type(default) in (int, float) and not choices:
            assert low <= default <= high and low > -inf, name
            assert getattr(from_dict({name: type(default)(low)}), name) == low
            for outside in [low - 1] + [high + 1] * (high < inf):
                with pytest.raises(ValueError, match=f"{flag_of(name)} .*: must be at least {low:g}"):
                    from_dict({name: type(default)(outside)})
    asked = ["--toy-images", "0", "--run", str(tmp_path / "run"), "--data-root", str(tmp_path / "data")]
    refused(capsys, train.main(asked), "error: --toy-images 0: must be at least 1")  # before anything is drawn
    assert list(tmp_path.iterdir()) == []


def test_differences_are_those_that_change_results():
    ours, theirs = Config(target_lr=0.1, mask="none"), Config(device="cuda:3", workers=9, precision="bf16", micro_batch=3)
    assert differences(ours, theirs) == ["mask: 'own' -> 'none'", "target_lr: 0.0001 -> 0.1"]
    assert differences(theirs, Config()) == [] and differences(ours, Config(), also=("mask", "target_lr")) == []
    for name, field in FIELDS.items():
        if type(field.default) is int and name not in MACHINE:
            assert differences(replace(Config(), **{name: field.default + 1}), Config()), name
