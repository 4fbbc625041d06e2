"""One projection for several kinds of features, against the same computed from the features themselves."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_compress.fitting.ridge import ridge
from autoglm_compress.fitting.shared_adapter import fit_shared, gram_of, relative_errors, shared_moments, spread

torch.set_num_threads(1)
KINDS = {"image": 30, "audio": 90}
Matrices = dict[str, torch.Tensor]


def drawn(seed: int, inputs: int = 5, outputs: int = 3) -> tuple[Matrices, Matrices, Matrices]:
    """Features, their projections with a bias, and what these give."""
    generator = torch.Generator().manual_seed(seed)
    features, projections, given_out = {}, {}, {}
    for number, (kind, tokens) in enumerate(KINDS.items()):
        mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
        features[kind] = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing + number
        projections[kind] = torch.randn(outputs, inputs + 1, generator=generator, dtype=torch.float64)
        given_out[kind] = features[kind] @ projections[kind][:, :-1].T + projections[kind][:, -1]
    return features, projections, given_out


def test_the_spread_is_the_mean_squared_distance_from_the_mean():
    features, projections, outputs = drawn(0)
    for kind, found in outputs.items():
        expected = (found - found.mean(0)).square().sum(1).mean()
        torch.testing.assert_close(spread(gram_of(features[kind]), projections[kind]), float(expected))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), strength=st.sampled_from([1e-6, 1e-2, 1.0]))
def test_the_closed_form_is_that_of_the_stacked_features(seed: int, strength: float):
    """Rows of both kinds, each divided by the root of its s_m, in one ridge regression towards zero."""
    features, projections, outputs = drawn(seed)
    grams = {kind: gram_of(each) for kind, each in features.items()}
    moments = shared_moments(grams, projections, {kind: spread(grams[kind], projections[kind]) for kind in KINDS})
    sizes = {kind: (each - each.mean(0)).square().sum().sqrt() for kind, each in outputs.items()}
    x = torch.cat([torch.cat([f, torch.ones(len(f), 1)], 1) / sizes[kind] for kind, f in features.items()])
    y = torch.cat([each / sizes[kind] for kind, each in outputs.items()])
    mu = strength * x.square().sum(0).mean()
    stacked = torch.cat([x, mu.sqrt() * torch.eye(x.shape[1])]), torch.cat([y, torch.zeros(x.shape[1], y.shape[1])])
    expected = torch.linalg.lstsq(*stacked).solution.T
    zero = torch.zeros_like(projections["image"])
    torch.testing.assert_close(ridge(moments, zero, strength), expected, rtol=1e-6, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_no_other_projection_has_smaller_errors(seed: int):
    features, projections, outputs = drawn(seed)
    grams = {kind: gram_of(each) for kind, each in features.items()}
    spreads = {kind: spread(grams[kind], projections[kind]) for kind in KINDS}
    found = fit_shared(grams, grams, projections).weight
    errors = relative_errors(found, grams, projections, spreads)
    for kind, each in outputs.items():
        missing = features[kind] @ found[:, :-1].T + found[:, -1] - each
        expected = missing.square().sum(1).mean() / spreads[kind]
        torch.testing.assert_close(errors[kind], float(expected), rtol=1e-6, atol=1e-9)
    generator = torch.Generator().manual_seed(seed)
    for other in (*projections.values(), found + 0.1 * torch.randn(found.shape, generator=generator)):
        assert sum(errors.values()) < sum(relative_errors(other, grams, projections, spreads).values())


def test_equal_projections_stay():
    features, projections, _ = drawn(3)
    same = dict.fromkeys(projections, projections["image"])
    grams = {kind: gram_of(each) for kind, each in features.items()}
    assert torch.equal(fit_shared(grams, grams, same).weight, projections["image"])
