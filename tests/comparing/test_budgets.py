"""Budgets: the largest size that stays below, found by counting, not by guessing."""

import pytest

from multitune import ConfigError, make_method, method_names
from multitune.comparing.budgets import counted, fit, size_of

#: Hidden width, layers and feed-forward width of the tiny BERT.
D, L, F = 32, 3, 48


def test_lora_gets_the_rank_that_the_formula_gives(bert):
    per_rank = L * 2 * (D + D)  # query and value, A and B
    for most in (per_rank, 5 * per_rank, 5 * per_rank + 1, 6 * per_rank - 1):
        assert fit(bert, "lora", {}, most, max_length=16) == {"r": most // per_rank}
    assert fit(bert, "lora", {}, per_rank - 1, max_length=16) is None


def test_settings_that_are_given_stay_and_count(bert):
    found = fit(bert, "lora", {"targets": ["ffn_in"], "alpha": 4}, 1000, max_length=16)
    assert found == {"targets": ["ffn_in"], "alpha": 4, "r": 1000 // (L * (D + F))}


@pytest.mark.parametrize("name", [n for n in method_names() if not make_method(n).changes_weights and size_of(n)])
def test_no_larger_size_stays_below(bert, name):
    size = size_of(name)

    def parameters(n):
        try:
            return counted(bert, make_method(name, size.settings(n, bert, {})))
        except ConfigError:  # too large for this backbone
            return None

    smallest = parameters(size.least)
    most = 3 * smallest + 7
    longest = bert.max_length - 16 if size.takes_positions else bert.max_length if size.is_length else 500
    possible = []
    for n in range(size.least, longest + 1):  # every size, one by one, and some beyond
        possible.append(parameters(n) or 0)
        if possible[-20:] and min(possible[-20:]) > most:
            break
    found = fit(bert, name, {}, most, max_length=16)
    assert counted(bert, make_method(name, found)) == max(p for p in possible if p <= most)
    assert fit(bert, name, {}, smallest - 1, max_length=16) is None


def test_a_network_that_only_training_has_does_not_count(bert):
    kept = L * 2 * D
    assert fit(bert, "prefix", {}, 3 * kept + 1, max_length=16) == {"length": 3}
    assert make_method("prefix", {"length": 3}).num_parameters(bert) > 3 * kept + 1


def test_a_prompt_leaves_room_for_the_text(bert):
    found = fit(bert, "prompt", {}, 10**6, max_length=16)
    assert found == {"length": bert.max_length - 16}


def test_what_has_no_size_fits_or_does_not(bert):
    count = make_method("bitfit").num_parameters(bert)
    assert size_of("bitfit") is None
    assert fit(bert, "bitfit", {}, count, max_length=16) == {}
    assert fit(bert, "bitfit", {}, count - 1, max_length=16) is None
    assert fit(bert, "head", {}, 1, max_length=16) == {}


def test_of_several_methods_the_first_with_a_size_grows(bert):
    own = make_method("bitfit").num_parameters(bert)
    found = fit(bert, "bitfit+lora", {}, own + 3 * L * 2 * 2 * D, max_length=16)
    assert found == {"lora.r": 3}


def test_a_compacter_keeps_a_bottleneck_that_its_dimension_divides(bert):
    found = fit(bert, "compacter", {"phm_dim": 2}, 3000, max_length=16)
    assert found["bottleneck"] % 2 == 0
    assert make_method("compacter", found).num_parameters(bert) <= 3000


def test_a_size_that_is_given_beside_a_budget_is_refused(bert):
    with pytest.raises(ConfigError, match="r is what the budgets choose, so r=4 cannot be honoured"):
        fit(bert, "lora", {"r": 4}, 10_000, max_length=16)
