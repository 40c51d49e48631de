"""Progress where there is no terminal."""

import re

from vllm_ext import progress


def test_a_pipe_gets_lines_while_it_runs(capsys, monkeypatch):
    with progress.progress() as bars:
        task = bars.add_task("", total=4)
        bars.update(task, description="stock starts")
        assert capsys.readouterr().err.strip() == "stock starts: 0%, 0 s gone"
        bars.advance(task, 2)
        assert capsys.readouterr().err == ""  # not a line for each step
        monkeypatch.setattr(progress, "LINE_SECONDS", 0)
        bars.advance(task, 1)
        assert re.match(r"stock starts: 75%, 0 s gone, some \d s left", capsys.readouterr().err)


def test_tracks(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with progress.progress() as bars:
        assert list(bars.track([1, 2], description="timing")) == [1, 2]
    assert "timing" in capsys.readouterr().err
