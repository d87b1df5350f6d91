"""The command that counts what stage 3 keeps and drops of drawn portraits."""

import pytest

from checkpoints.tiny_models.curation import Config, Verdict, later, main, markdown
from faceprior.procedural import FLAWS


def row_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_by_hand():
    """3 of 4 good ones kept, 2 of 3 blurred ones dropped; copies count in the run with that gate only."""
    single = [Verdict("good", seed, ("noisy",) * (seed == 20_000)) for seed in range(20_000, 20_004)]
    single += [Verdict("blur", 20_000, ("blurred", "enlarged")), Verdict("blur", 20_001, ("blurred",))]
    single += [Verdict("blur", 20_002, ())]
    copies = [Verdict("good", 20_000, ()), Verdict("duplicate", 20_000, ("near-duplicate",))]
    single += [Verdict(name, 20_000, ("fault",)) for name in FLAWS if name not in ("blur", "duplicate")]
    text = markdown(Config(), single, copies)
    assert row_of(text, "good")[1:3] == ["4", "75.0%"] and row_of(text, "good")[-1] == "no"
    # Wilson of 2 of 3 with z = 1.96: middle (2/3 + 1.92 / 3) / (1 + 3.84 / 3) = 0.573, half width 0.365
    assert row_of(text, "blur")[1:4] == ["3", "66.7%", "20.8% to 93.9%"]
    assert row_of(text, "blur")[-1] == "blurred 100%, enlarged 50%"
    assert row_of(text, "duplicate")[1:3] == ["1", "100.0%"]
    assert row_of(text, "good, with the gate for near-duplicates")[1:3] == ["1", "100.0%"]


def test_copies_are_judged_after_the_good_portraits():
    """Stage 3 takes names in their order, and keeps the first of two."""
    assert later("duplicate") > "good" and later("blur") == "blur"


def test_more_flawed_than_good_portraits_are_refused():
    with pytest.raises(ValueError, match="`num_flawed` \\(3\\) has to be at most `num_good` \\(2\\)"):
        main(Config(num_good=2, num_flawed=3))


@pytest.mark.slow
def test_the_command_draws_runs_the_stage_and_resumes(tmp_path, capsys):
    config = Config(
        work=str(tmp_path / "work"), output=str(tmp_path / "out"), num_good=2, num_flawed=1, first_seed=14_000
    )
    main(config)
    text = (tmp_path / "out" / "curation.md").read_text()
    assert row_of(text, "good")[1] == "2" and all(row_of(text, name)[1] == "1" for name in FLAWS)
    main(config)
    assert (tmp_path / "out" / "curation.md").read_text() == text
