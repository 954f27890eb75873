"""A minute of checkpoints with mistakes in them (fuzz.py), the same ones every time."""

from fuzz import fuzz


def test_a_checkpoint_with_a_mistake_is_read_as_what_it_is_or_refused(tmp_path, record_property):
    outcomes, wrong = fuzz(cases=1000, seconds=60, seed=0, scratch=tmp_path)
    record_property("checkpoints with mistakes", dict(outcomes.most_common()))
    assert not wrong, "\n".join(wrong)
    assert outcomes["refused"] > outcomes.total() / 2
