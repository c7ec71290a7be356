"""Logging that stays out of the program's way, and the jit setting."""

import inspect
import logging

import pytest

import polus.core
from polus.core import BaseLogger


@pytest.fixture(autouse=True)
def shared_logger(monkeypatch, tmp_path):
    """Polus' shared logger as it is in a new process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    shared = logging.getLogger("polus")
    monkeypatch.setattr(shared, "handlers", [])
    monkeypatch.setattr(shared, "level", logging.NOTSET)
    yield shared
    for handler in shared.handlers:
        handler.close()


class Trainer(BaseLogger):
    pass


def test_descendants_share_handlers_and_have_loggers_of_their_own(shared_logger):
    one, other = Trainer(), BaseLogger()
    assert one.logger.name == "polus.Trainer"
    assert other.logger.name == "polus.BaseLogger"
    assert len(shared_logger.handlers) == 1


def test_messages_from_info_on_reach_the_console(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    trainer = Trainer()
    trainer.logger.debug("details")
    trainer.logger.info("news")
    assert capsys.readouterr().err == "news\n"
    trainer.set_logging_level(logging.DEBUG)
    BaseLogger().logger.debug("details")
    trainer.set_logging_level(logging.WARNING)
    trainer.logger.info("news")
    assert capsys.readouterr().err == "details\n"


def test_the_console_is_silent_where_the_program_configures_logging(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    Trainer().logger.info("news")
    assert capsys.readouterr().err == ""


def test_a_log_file_appears_only_where_one_is_asked_for(tmp_path):
    Trainer().logger.info("not written")
    assert not list(tmp_path.iterdir())
    Trainer(log_name="mine.log").logger.info("first")
    BaseLogger(log_name="mine.log").logger.info("second")  # one handler, not two
    lines = (tmp_path / "mine.log").read_text().splitlines()
    assert [line.split(": ")[-1] for line in lines] == ["first", "second"]
    trainer = Trainer()
    trainer.log_to_file()
    trainer.logger.info("here")
    assert (tmp_path / "polus.log").read_text().endswith("here\n")


def test_the_documented_signature():
    parameters = inspect.signature(BaseLogger).parameters
    assert parameters["logging_level"].default == 10
    assert parameters["log_name"].default == "polus.log"


def test_jit_compile_is_a_setting():
    assert polus.core.get_jit_compile() == "auto"
    try:
        for mode in (True, False, "auto"):
            polus.core.set_jit_compile(mode)
            assert polus.core.get_jit_compile() == mode
        with pytest.raises(ValueError, match="mode must be True, False or 'auto', got 'yes'"):
            polus.core.set_jit_compile("yes")
    finally:
        polus.core.set_jit_compile("auto")


def test_a_backend_that_polus_does_not_have():
    from polus.backends import load

    with pytest.raises(ValueError, match="KERAS_BACKEND is 'openvino'"):
        load("openvino")
