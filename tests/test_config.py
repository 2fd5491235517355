"""Switches: who wins over whom, what JSON keeps, and one sentence for every value that cannot be."""
from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace

import pytest

import train
from tests.helpers import refused
from ucdr_ref.config import (
    FIELDS,
    MACHINE,
    PRESETS,
    VARIANTS,
    Config,
    add_arguments,
    differences,
    from_dict,
    inside,
    resolve,
    to_json,
)


def parsed(*flags: str) -> dict:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args(list(flags)))


def test_flags_over_variant_over_preset_over_defaults():
    plain = Config()
    assert resolve({}, "sketchy/eccv").prompt_length == 4 != plain.prompt_length
    assert resolve({"variant": "released"}, "sketchy/eccv").stroke_domains == ("sketch", "quickdraw") != plain.stroke_domains
    both = resolve({"variant": "released", "mask": "own", "prompt_length": 7}, "sketchy/eccv")
    assert (both.mask, both.prompt_length, both.feature_token, both.context_vectors) == ("own", 7, 1, 8)
    for preset, values in PRESETS.items():  # what neither preset, variant nor flag names is the default
        found = asdict(resolve({"target_lr": 0.5}, preset))
        assert found == {**asdict(plain), **values, "target_lr": 0.5}, preset


def test_every_variant_and_preset_names_fields_that_exist_and_fit():
    for values in [*PRESETS.values(), *VARIANTS.values()]:
        assert asdict(from_dict(values)) == {**asdict(Config()), **values}


def test_presets_without_a_name():
    assert resolve({}) == from_dict(PRESETS["toy"])
    assert resolve({}, fast=True) == from_dict(PRESETS["toy/fast"])
    assert resolve({"dataset": "tuberlin"}) == from_dict(PRESETS["tuberlin"])
    assert resolve({"dataset": "domainnet", "held_out": "clipart"}).seen == ""  # the protocol's own, not a row's
    assert resolve({"method": "sre-clip"}) == from_dict(PRESETS["sre/toy"])
    assert resolve({"method": "sre-clip"}, fast=True) == from_dict(PRESETS["sre/toy-fast"])
    assert resolve({"method": "sre-clip", "source": ["a"], "target": "b"}) == replace(from_dict(PRESETS["sre"]), source=("a",),
                                                                                  target="b")
    sre = resolve({"method": "sre-clip", "variant": "released"})
    assert sre.stroke_domains == () and sre.structure_pairs == "diagonal"  # D14 is not this method's
    assert resolve({"method": "closed-form"}).dataset == "toy"
    for flags, preset in (({"dataset": "domainnet"}, None), ({"method": "sre-clip", "source": ["a"]}, None), ({}, "toy")):
        with pytest.raises(ValueError, match="--fast is short for the demonstration alone"):
            resolve(flags, preset, fast=True)
    with pytest.raises(ValueError, match="no such preset.*tuberlin"):
        resolve({}, "cats")
    for flags in ({"dataset": "folder"}, {"method": "sre-clip"}):
        with pytest.raises(ValueError, match="--preset tuberlin is for"):
            resolve(flags, "tuberlin")


def test_flags_have_the_fields_types_and_leave_no_trace_when_absent():
    assert parsed() == {}
    given = parsed("--target-lr", "0.1", "--seed", "3", "--stroke-domains", "a", "b", "--mask", "none", "--feature-token", "1")
    assert given == {"target_lr": 0.1, "seed": 3, "stroke_domains": ["a", "b"], "mask": "none", "feature_token": 1}
    assert resolve(given).stroke_domains == ("a", "b")


def test_json_there_and_back():
    for config in (Config(), resolve({"variant": "released", "source": ["x", "y"]}, "sre"), resolve({"target_lr": 1e-7})):
        assert from_dict(json.loads(to_json(config))) == config
    assert list(json.loads(to_json(Config()))) == list(FIELDS)
    assert from_dict({"target_lr": 1}).target_lr == 1.0 and type(from_dict({"target_lr": 1}).target_lr) is float


@pytest.mark.parametrize(("values", "sentence"), [
    ({"tao": 1.0}, r"unknown config fields \['tao'\]"), ({None: 1, "x": 2}, "unknown config fields"),
    ({"mask": "theirs"}, "mask is 'theirs', expected one of own, none"),
    ({"feature_token": 2}, "feature_token is 2"), ({"feature_token": True}, "feature_token is True"),
    ({"seed": 1.0}, "seed is 1.0, expected int"), ({"seed": "1"}, "seed is '1'"), ({"seed": True}, "seed is True"),
    ({"seed": None}, "seed is None"), ({"seed": -1}, "seed is -1, expected a finite number x with 0 <= x"),
    ({"target_lr": float("nan")}, "target_lr is nan"), ({"target_lr": float("inf")}, "target_lr is inf"), ({"target_lr": True}, "target_lr is True"),
    ({"target_lr": "1"}, "target_lr is '1', expected float"), ({"source": "folder"}, "source is 'folder', expected tuple"),
    ({"source": [1]}, r"source is \[1\]"), ({"weights": 3}, "weights is 3, expected str"),
    ({"target_lr": 10 ** 400}, "target_lr is 10+, expected float"), ({"weights": "x", "data_root": ["\n" * 9000]}, "data_root is")])
def test_values_that_cannot_be(values, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        from_dict(values)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(("flag", "value"), [
    ("target_lr", -1), ("eval_batch", 0), ("save_every", 0),
    ("sre_hidden", 0), ("sre_dropout", 1), ("sre_kappa", 1.5), ("holdback", 1), ("workers", 10**6),
    ("prompt_length", 0), ("toy_images", 0), ("micro_batch", -1)])
def test_a_number_outside_its_range_is_refused_before_anything_is_drawn_read_or_written(flag, value, tmp_path, capsys):
    asked = ["--" + flag.replace("_", "-"), str(value), "--run", str(tmp_path / "run"), "--data-root", str(tmp_path / "data")]
    refused(capsys, train.main(asked), flag, FIELDS[flag].rule)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rule", "inner", "outer"), [
    ("0 <= x", (0, 1e300), (-1e-9, float("inf"))), ("0 < x", (1e-300,), (0, -1)), ("0 <= x < 1", (0, 0.999), (1, -1)),
    ("0 <= x <= 1", (0, 1), (1.0001, -1e-9, float("nan")))])
def test_rules_are_read_as_written(rule, inner, outer):
    assert all(inside(x, rule) for x in inner) and not any(inside(x, rule) for x in outer)


def test_every_number_has_a_rule_that_its_default_obeys_and_every_flag_says_its_default():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for action in parser._actions[2:]:
        assert "(default: " in action.whole_help, action.dest
    for name, field in FIELDS.items():
        assert field.choices or field.metavar, name
        if field.kind in (int, float) and not field.choices:
            assert inside(field.default, field.rule), name


def test_differences_are_those_that_change_results():
    ours = Config(target_lr=0.1, mask="none", **{name: FIELDS[name].default for name in MACHINE})
    theirs = replace(Config(), device="cuda:3", workers=9, precision="bf16", save_every=7, eval_batch=1)
    assert differences(ours, theirs) == ["mask: 'own' -> 'none'", "target_lr: 0.0001 -> 0.1"]
    assert differences(theirs, Config()) == [] and set(MACHINE) < set(FIELDS)
    for name, field in FIELDS.items():
        if isinstance(field.default, int) and name not in MACHINE:
            assert differences(replace(Config(), **{name: field.default + 1}), Config()), name
