import pytest
import yaml

from openwork.recipes.classification import ClassificationConfig as Config
from openwork.recipes.config import comparison, differences, source_of, values_of
from openwork.recipes.parser import parse

CompareConfig = comparison(Config)


def config(*words, cls=Config):
    return parse(cls, words, "openwork", "")


def test_defaults_are_the_dataclass_defaults():
    assert config() == Config()
    assert config(cls=CompareConfig) == CompareConfig()


def test_flags_override_the_file_and_the_file_overrides_the_preset(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("preset: paper\nepochs: 50\nlr: 2e-1\nexclude: [fc, conv1]\n")
    found = config("--config", str(file), "--epochs", "7")
    assert (found.epochs, found.lr, found.exclude) == (7, 0.2, ["fc", "conv1"])
    assert (found.batch_size, found.warmup, found.model) == (256, 5, "resnet50")


def test_a_pattern_in_yaml_is_not_a_number_in_base_sixty(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("patterns: [2:4, 1:16]\ndecay: [2e-4, -1e-3]\n")
    found = config("--config", str(file), cls=CompareConfig)
    assert (found.patterns, found.method_options) == (["2:4", "1:16"], {"decay": [2e-4, -1e-3]})


def test_a_written_configuration_reads_back(tmp_path):
    file = tmp_path / "config.yaml"
    original = Config(pattern="1:16", method_options={"decay": -3e-5}, exclude=["fc"], resume=True, progress=False)
    file.write_text(yaml.safe_dump(values_of(original)))
    assert config("--config", str(file)) == original


def test_negative_decays_and_dashes():
    found = config("--decay", "-2e-4", "2e-4", "--batch-size=32", "--topology-every", "5", cls=CompareConfig)
    assert found.method_options == {"decay": [-2e-4, 2e-4]}
    assert (found.batch_size, found.topology_every) == (32, 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "asp"], "asp prunes a trained dense network: .* --init DENSE"),
        (["--batch-size", "30", "--accumulate", "4"], "must divide by accumulate x devices x nodes = 4; use 28"),
        (["--epochs", "1", "--warmup", "1"], "--warmup 1 leaves nothing of --epochs 1; give a shorter one"),
        (["--log-every", "0"], "log_every is 0; it must be at least 1"),
        (["--preset", "papr"], "use one of paper"),
        (["--pattern", "4:2"], "N:M"),
    ],
)
def test_bad_values_say_what_to_do(words, message):
    with pytest.raises(ValueError, match=message):
        config(*words)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("mnist", ValueError, "use one of digits, fashion-mnist=DIR"),
        ("cifar10", ValueError, "write cifar10=DIR"),
        ("imagefolder=/no/such", FileNotFoundError, "train/CLASS"),
    ],
)
def test_bad_data_says_what_is_needed(spec, error, message):
    with pytest.raises(error, match=message):
        source_of(Config(data=spec))


def test_differences_name_fields_and_leave_out_where_a_run_happens():
    old = values_of(Config())
    assert differences(old, Config(out="elsewhere", threads=3, resume=True)) == []
    assert differences(old, Config(lr=0.2)) == ["lr: 0.1 -> 0.2"]


def test_a_flag_that_is_newer_than_a_stored_run_had_its_default():
    method = ("--method", "transposable-sr-ste")
    stored = values_of(config("--lr", "0.3", *method))
    del stored["refresh_every"], stored["clip"]
    assert not differences(stored, config("--lr", "0.3", *method))
    other = config("--lr", "0.3", *method, "--refresh_every", "7")
    assert differences(stored, other) == ["refresh_every: 40 -> 7"]


def test_another_method_differs_by_its_options_too():
    stored = values_of(config())
    assert differences(stored, config("--method", "ste")) == [
        "decay: 0.0002 -> None",
        "decoupled: False -> None",
        "method: 'sr-ste' -> 'ste'",
    ]
