"""What the environment may set, and how the rest is reported."""

import logging
import re
from pathlib import Path

import pytest

from starling.errors import StarlingError
from starling.settings import Settings

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_lists_every_setting_and_its_default() -> None:
    table = re.findall(r"^\| `((?:STARLING|COG)_\w+)` \| `?([^ |`;]*)", README.read_text(encoding="utf-8"), re.M)
    names = {str(field.alias): name for name, field in Settings.model_fields.items()}
    assert [variable for variable, _ in table] == list(names)
    defaults = Settings()
    for variable, told in table:
        default = getattr(defaults, names[variable])
        if default is not None and variable != "COG_MAX_CONCURRENCY":  # its cell begins with the image's default
            assert getattr(Settings.from_env({variable: told}), names[variable]) == default, variable


def test_a_wrong_value_is_named_with_its_rule() -> None:
    with pytest.raises(StarlingError) as caught:
        Settings.from_env({"STARLING_THREADS": "0", "STARLING_DEVICE": "tpu", "STARLING_KV_DTYPE": "float16"})
    assert "STARLING_THREADS is '0': Input should be greater than or equal to 1" in str(caught.value)
    assert "STARLING_DEVICE is 'tpu': Input should be 'auto', 'cpu' or 'cuda'" in str(caught.value)
    assert "STARLING_KV_DTYPE" not in str(caught.value)


@pytest.mark.parametrize("seconds", ["inf", "1e10", "nan", "0"])
def test_the_hang_timeout_is_a_time_that_python_can_wait(seconds: str) -> None:
    with pytest.raises(StarlingError, match=f"STARLING_HANG_AFTER_S is '{seconds}'"):
        Settings.from_env({"STARLING_HANG_AFTER_S": seconds})


def test_blocks_may_be_larger() -> None:
    assert Settings.from_env({"STARLING_BLOCK_SIZE": "32"}).block_size == 32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COG_MAX_CONCURRENCY", "0"),
        ("COG_MAX_CONCURRENCY", "257"),
        ("STARLING_THREADS", "1025"),
        ("STARLING_KV_CACHE_BYTES", "0"),
        ("STARLING_BLOCK_SIZE", "8"),
        ("STARLING_PREFILL_TOKENS", "15"),
        ("STARLING_PREFILL_TOKENS", "8193"),
        ("STARLING_SPECULATIVE_ROWS", "-1"),
        ("STARLING_SPECULATIVE_ROWS", "257"),
    ],
)
def test_values_that_no_engine_can_run_with_are_refused(name: str, value: str) -> None:
    with pytest.raises(StarlingError, match=f"{name} is '{value}'"):
        Settings.from_env({name: value})


def test_a_flag_is_accepted_as_people_write_it() -> None:
    for text, meant in (("1", True), (" True\n", True), ("YES", True), ("no", False)):
        assert Settings.from_env({"STARLING_ALLOW_DOWNLOAD": text}).allow_download is meant


def test_what_is_blank_is_not_set() -> None:
    assert Settings.from_env({"STARLING_THREADS": "", "STARLING_WEIGHTS": ""}) == Settings()


def test_a_misspelt_name_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Settings.from_env({"STARLING_THREADS": "2", "HOME": "/root"})
        assert not caplog.messages
        Settings.from_env({"STARLING_THREAD": "2", "STARLING_PORT": "tcp://10.0.0.1:5000", "HOME": "/root"})
    assert caplog.messages == ["Ignored unknown settings: STARLING_PORT, STARLING_THREAD"]
