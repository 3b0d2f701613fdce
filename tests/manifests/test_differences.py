"""Settings that differ are named, all of them, and only those."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtpipe.manifests.canonical import canonical_json
from dtpipe.manifests.differences import differences, listed, refuse_differences
from dtpipe.manifests.errors import PlanChangedError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)
json_documents = st.dictionaries(st.text(max_size=2), json_values, max_size=4)


@given(one=json_documents, other=json_documents)
def test_there_are_none_exactly_for_equal_documents(one, other):
    assert differences(one, one) == []
    assert bool(differences(one, other)) == (canonical_json(one) != canonical_json(other))


def test_the_refusal_names_fields_inside_lists_and_objects_with_both_values():
    stored = {"views": [{"flip": False}, {"flip": False}], "seed": 0, "old": None, "name": "a"}
    wanted = {"views": [{"flip": False}, {"flip": True}], "seed": 7, "new": "x" * 200, "name": "a"}
    with pytest.raises(PlanChangedError) as refusal:
        refuse_differences("out holds a run", differences(stored, wanted, "run."), "start anew")
    long = '"' + "x" * 79
    assert str(refusal.value) == (
        f"out holds a run (run.new: not set -> {long}..; run.old: null -> not set; run.seed: 0 -> 7; "
        "run.views[1].flip: false -> true); start anew"
    )
    refuse_differences("out holds a run", differences(wanted, wanted))


def test_a_message_names_eight_and_counts_the_rest():
    assert listed(range(8)) == "0; 1; 2; 3; 4; 5; 6; 7"
    assert listed(range(11)).endswith("; 7; and 3 more")
