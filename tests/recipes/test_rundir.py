import pytest

from openwork.recipes.rundir import RunDir, read_lines, write_text


def test_rewind_cuts_lines_written_after_the_checkpoint(tmp_path):
    run = RunDir(tmp_path)
    run.append("metrics.jsonl", {"step": 1})
    offsets = run.offsets()
    run.append("metrics.jsonl", {"step": 2})
    run.append("topology.jsonl", {"step": 2})
    run.rewind(offsets)
    run.append("metrics.jsonl", {"step": 3})
    assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl")] == [1, 3]
    assert read_lines(tmp_path / "topology.jsonl") == []


def test_rewind_refuses_an_edited_file(tmp_path):
    run = RunDir(tmp_path)
    run.append("metrics.jsonl", {"step": 1})
    offsets = run.offsets()
    write_text(tmp_path / "metrics.jsonl", "")
    with pytest.raises(ValueError, match=r"metrics.jsonl is shorter than its checkpoint says"):
        run.rewind(offsets)


def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    write_text(tmp_path / "x.jsonl", '{"step": 1}\n{"step": 2')
    assert read_lines(tmp_path / "x.jsonl") == [{"step": 1}]
    assert read_lines(tmp_path / "missing.jsonl") == []
