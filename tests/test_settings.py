"""What the environment may say, and what is said of the rest."""

import logging

import pytest

from starling.errors import StarlingError
from starling.settings import Settings


def test_a_wrong_value_is_named_with_its_rule() -> None:
    with pytest.raises(StarlingError) as caught:
        Settings.from_env({"STARLING_THREADS": "0", "STARLING_DEVICE": "tpu", "STARLING_KV_DTYPE": "float16"})
    assert "STARLING_THREADS is '0': Input should be greater than or equal to 1" in str(caught.value)
    assert "STARLING_DEVICE is 'tpu': Input should be 'auto', 'cpu' or 'cuda'" in str(caught.value)
    assert "STARLING_KV_DTYPE" not in str(caught.value)


@pytest.mark.parametrize("seconds", ["inf", "1e10", "nan", "0"])
def test_a_hang_comes_after_a_time_that_can_be_waited(seconds: str) -> None:
    with pytest.raises(StarlingError, match=f"STARLING_HANG_AFTER_S is '{seconds}'"):
        Settings.from_env({"STARLING_HANG_AFTER_S": seconds})


def test_what_is_blank_is_not_set() -> None:
    assert Settings.from_env({"STARLING_THREADS": "", "STARLING_WEIGHTS": ""}) == Settings()


def test_a_misspelt_name_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Settings.from_env({"STARLING_THREADS": "2", "HOME": "/root"})
        assert not caplog.messages
        Settings.from_env({"STARLING_THREAD": "2", "STARLING_PORT": "tcp://10.0.0.1:5000", "HOME": "/root"})
    assert caplog.messages == ["Unknown settings, without effect: STARLING_PORT, STARLING_THREAD"]
