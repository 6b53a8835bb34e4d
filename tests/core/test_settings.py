"""Settings from files, environment and command line: types, names, precedence, and the merge."""

import builtins
import dataclasses
import json
import typing

import pytest

import magi_train
from magi_train import CommConfig, Config, FusionConfig
from magi_train.cli import main
from magi_train.core import settings
from magi_train.core.errors import SettingError
from tests.models import Small

TOML = 'tier = "region"\n[comm]\nbucket_mib = 25\n[fusion]\nloss = false\n'


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "magi.toml"
    path.write_text(TOML)
    return path


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv(settings.VARIABLE, raising=False)


def test_every_setting_has_a_help_and_can_be_given_as_text():
    known = settings.known_settings()
    leaves = {key for key in known if not settings.is_part(key)}
    assert {"tier", "comm.bucket_mib", "fusion.loss"} <= leaves
    assert len(leaves) == sum(
        1 if part is None else len(dataclasses.fields(part))
        for part in map(settings._part_of, typing.get_type_hints(Config).values())
    )
    for key in leaves:
        assert known[key].help, f"{key} has no text under its field"
        text = settings.as_text(known[key].default)
        assert settings.read(key, text, settings.COMMAND_LINE) == known[key].default, key


def test_a_file_makes_a_config(toml):
    config = Config.from_file(toml)
    wanted = Config(
        tier="region", comm=CommConfig(bucket_mib=25.0), fusion=FusionConfig(loss=False)
    )
    assert config == wanted


def test_yaml_says_the_same(tmp_path, toml, monkeypatch):
    pytest.importorskip("yaml")
    path = tmp_path / "magi.yaml"
    path.write_text("tier: region\ncomm: {bucket_mib: 25}\nfusion: {loss: false}\n")
    assert Config.from_file(path) == Config.from_file(toml)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "yaml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingError, match=r"magi\.yaml .* YAML needs pyyaml"):
        Config.from_file(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[comm]\nbucket_mb = 25", "no setting 'comm.bucket_mb' .*; did you mean 'comm.bucket_mib"),
        ("[fusio]\nloss = false", "no setting 'fusio' .*; did you mean 'fusion'"),
        ('[comm]\nbucket_mib = "25"', r"comm\.bucket_mib .* a number or none, got '25' \(str\)"),
        ("[fusion]\nloss = 1", r"fusion\.loss .* must be true or false, got 1 \(int\)"),
        ("[comm]\nbucket_mib = true", r"must be a number or none, got True \(bool\)"),
        ("tier = ", "cannot be read as settings: Invalid value"),
        ("[comm]\nbucket_mib = -1", r"must be positive, got -1.0 \(settings from .*magi\.toml"),
    ],
)
def test_a_wrong_file_names_key_type_and_value(toml, text, words):
    toml.write_text(text)
    with pytest.raises(SettingError, match=words) as caught:
        Config.from_file(toml)
    assert str(toml) in str(caught.value)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("fusion.los=false", "did you mean 'fusion.loss'"),
        ("bucket_mib=3", "did you mean 'comm.bucket_mib'"),
        ("fusion.tune=true", "did you mean 'tune'"),
        ("tier=grap", "must be auto or graph or region or eager, got 'grap'"),
        ("comm.bucket_mib=abc", "must be a number or none, got 'abc'"),
        ("fusion.loss=1", "must be true or false, got '1'"),
        ("tier", "'tier' must be key=value"),
        ("config=/nowhere.toml", "/nowhere.toml cannot be read"),
        ("fusion=true", "must be none, got 'true'"),
    ],
)
def test_a_wrong_word_names_key_type_and_value(word, words, capsys):
    assert main(["config", "show", f"--magi.{word}"]) == 2
    assert words in capsys.readouterr().err


def test_a_part_that_is_none_takes_no_fields():
    words = ["fusion=none", "fusion.loss=true"]
    with pytest.raises(SettingError, match=r"so fusion\.loss has no place"):
        settings.gather(words)
    assert settings.apply(Config(), settings.gather(words[:1]))[0] == Config(fusion=None)


def test_the_later_source_wins(toml, monkeypatch, capsys):
    monkeypatch.setenv(settings.VARIABLE, "comm.bucket_mib=30 fusion.loss=true")
    assert main(["config", "show", str(toml), "--magi.comm.bucket-mib=40", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["comm.bucket_mib"] == {"value": 40.0, "source": "command line"}
    assert shown["fusion.loss"] == {"value": True, "source": settings.VARIABLE}
    assert shown["tier"] == {"value": "region", "source": str(toml)}
    assert shown["tune"] == {"value": False, "source": "default"}
    assert "fusion" not in shown, "a part has no value of its own"


def test_a_file_in_the_variable_stays_below_words(toml, monkeypatch):
    monkeypatch.setenv(settings.VARIABLE, f"comm.bucket_mib=30 config={toml}")
    found = settings.gather()
    assert {k: v.value for k, v in found.items()} == {
        "tier": "region",
        "comm.bucket_mib": 30.0,
        "fusion.loss": False,
    }


def test_words_survive_the_way_to_the_ranks(monkeypatch):
    words = ["tier=region", "comm.bucket_mib=0.5", "dynamic=none", "fusion.loss=false", "tune=true"]
    found = settings.gather(words)
    monkeypatch.setenv(settings.VARIABLE, settings.to_words(found))
    assert {k: v.value for k, v in settings.from_environment().items()} == {
        k: v.value for k, v in found.items()
    }


def test_python_wins_field_by_field(monkeypatch):
    monkeypatch.setenv(settings.VARIABLE, "tier=eager comm.bucket_mib=30 fusion.loss=false")
    mine = Config(comm=CommConfig(bucket_mib=5), fusion=None, lowering="aot_eager")
    runtime = magi_train.prepare(Small(), config=mine)._magi_runtime
    assert runtime.config == dataclasses.replace(mine, tier="eager")
    notes = "\n".join(runtime.report.notes)
    assert "comm.bucket_mib=30.0 (MAGI_SETTINGS) has no effect: the script's Config says 5" in notes
    assert "fusion.loss=false (MAGI_SETTINGS) has no effect" in notes
    assert runtime.report.settings["tier"] == "eager"


def test_a_contradiction_names_the_source(monkeypatch):
    monkeypatch.setenv(settings.VARIABLE, "precision=fp8")
    with pytest.raises(SettingError, match=r"tier is 'eager'.*settings from MAGI_SETTINGS"):
        magi_train.prepare(Small(), config=Config(tier="eager"))


def test_config_keys_prints_the_text_under_the_field(capsys):
    assert main(["config", "keys"]) == 0
    out = capsys.readouterr().out
    assert "comm.bucket_mib: a number or none, default none\n    Size at which a bucket" in out
