"""The rehearsal goes through all of gpu.sh and notices what is wrong."""

import re
import tarfile

from benchmarks.card import rehearse
from support.paths import ROOT


def test_the_rehearsal_goes_through_all_stages_of_gpu_sh():
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    stages = set(re.findall(r"^stage_(\w+)\(\)", script, re.MULTILINE))
    rehearsed = " ".join(call.stages for call in rehearse.CALLS if call.code == 0).split()
    assert sorted(rehearsed) == sorted(stages)
    assert set(rehearse.RESULTS) == stages - {"smoke", "tests", "sanitizer"}


def test_the_rehearsal_breaks_a_program_that_is_there():
    broken = [call.broken for call in rehearse.CALLS if call.broken]
    assert broken and all((ROOT / path).is_file() for path in broken)


def test_the_rehearsal_sees_what_is_wrong(tmp_path):
    call = rehearse.Call("a call", "ceilings", 170)
    marked = f"# REHEARSED: x\n{rehearse.SENTENCE}\n"
    good = {"ceilings.log": "", "REHEARSED-1-ceilings-cpu.md": marked}
    good["REHEARSED-1-ceilings-cpu.json"] = '{"commit": "abc", "rows": []}'

    def faults(printed="", code=0, **changed):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
            for name, text in (good | changed).items():
                if text is not None:
                    (tmp_path / name).write_text(text)
                    archive.add(tmp_path / name, name)
        return rehearse.faults(call, code, printed, out, "abc")

    assert faults() == []
    assert faults(code=1) == ["exit code 1 instead of 0"]
    assert faults("== ceilings: no time left\n") == ["ceilings had no time left"]
    assert faults(**{"ceilings.log": None}) == ["there is no ceilings.log"]
    assert faults(**{"REHEARSED-1-ceilings-cpu.md": None}) == ["there is no ceilings.md"]
    assert faults(**{"2026-ceilings-cpu.md": marked})[0].endswith("not say that it is rehearsed")
    assert "in its table" in faults(**{"REHEARSED-1-ceilings-cpu.md": "# x"})[0]
    other = (
        '{"commit": null, "rows": [{"system": "torch", "failure": "no luck"}, {"failure": null}]}'
    )
    wrong = faults(**{"REHEARSED-1-ceilings-cpu.json": other})
    assert "names the commit None" in wrong[0] and wrong[1].endswith("torch: no luck")
    (tmp_path / "out" / "more").touch()
    assert "not one archive" in faults()[0]
