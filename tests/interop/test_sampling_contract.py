"""Every option of a sample, with our client and with the unmodified official one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tinker
import torch

import everstep
from tests.conftest import Service
from tests.scenario import MODEL, connect, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TEXT = [5, 6, 7, 8, 9, 10, 11, 12]
LENGTH = len(TEXT)


@pytest.fixture(scope="module", params=[everstep, tinker], ids=["ours", "official"])
def sdk(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def client(sdk: Any, service: Service) -> Any:
    return connect(sdk, service.url)


@pytest.fixture(scope="module")
def sampler(client: Any) -> Any:
    return client.create_sampling_client(base_model=MODEL).result()


def prompt(sdk: Any, tokens: list[int] = TEXT) -> Any:
    return sdk.ModelInput.from_ints(tokens)


def params(sdk: Any, **more: Any) -> Any:
    return sdk.SamplingParams(**{"max_tokens": 5, "seed": 3, "stop": [], **more})


def plain(response: Any) -> list[tuple[list[int], list[float], str]]:
    return [(list(s.tokens), list(s.logprobs), str(s.stop_reason)) for s in response.sequences]


def test_prompt_logprobs_can_be_limited_to_the_last_n(sdk: Any, sampler: Any) -> None:
    whole = sampler.compute_logprobs(prompt(sdk)).result()
    assert whole[0] is None
    assert len(whole) == LENGTH and all(logprob < 0 for logprob in whole[1:])
    last = sampler.compute_logprobs(prompt(sdk), prompt_logprobs_last_n=3).result()
    assert last == [None] * (LENGTH - 3) + whole[-3:]


def test_topk_logprobs_of_prompt_and_sample(sdk: Any, sampler: Any) -> None:
    greedy = params(sdk, temperature=0.0)
    asked = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 4, "topk_sample_logprobs": 2}
    response = sampler.sample(prompt(sdk), 2, greedy, **asked).result()
    rows = response.topk_prompt_logprobs
    assert (len(rows), rows[0]) == (LENGTH, None)
    for row in rows[1:]:
        assert len(row) == 4
        assert [logprob for _, logprob in row] == sorted((lp for _, lp in row), reverse=True)
    assert len(response.sequences) == 2
    for sequence in response.sequences:
        best = [(row[0][0], row[0][1]) for row in sequence.topk_logprobs]
        assert best == list(zip(sequence.tokens, sequence.logprobs, strict=True))
        assert all(len(row) == 2 for row in sequence.topk_logprobs)
    suffix = {**asked, "prompt_logprobs_last_n": 2}
    some = sampler.sample(prompt(sdk), 1, greedy, **suffix).result().topk_prompt_logprobs
    assert some == [None] * (LENGTH - 2) + rows[-2:]


def test_target_logprobs_dense_and_sparse(sdk: Any, sampler: Any) -> None:
    whole = sampler.compute_logprobs(prompt(sdk)).result()
    ids = torch.full((LENGTH - 1, 6), -1, dtype=torch.int64)
    ids[:, 0] = torch.tensor(TEXT[1:])
    dense = sdk.TensorData.from_torch(ids)
    sample = {"num_samples": 1, "sampling_params": params(sdk, max_tokens=1)}
    found = sampler.sample(prompt(sdk), target_prompt_logprobs=dense, **sample).result()
    scored = found.target_prompt_logprobs
    assert scored.sparse_crow_indices is None
    assert scored.to_torch()[:, 0].tolist() == whole[1:]
    assert not scored.to_torch()[:, 1:].any()

    few = torch.full((LENGTH - 1, 6), -1, dtype=torch.int64)
    few[3, 2], few[5, 0], few[5, 5] = TEXT[4], TEXT[6], 0
    sparse = sdk.TensorData.from_torch_sparse(few, pad_value=-1)
    assert sparse.sparse_crow_indices is not None
    found = sampler.sample(prompt(sdk), target_prompt_logprobs=sparse, **sample).result()
    scored = found.target_prompt_logprobs
    assert list(scored.sparse_crow_indices) == list(sparse.sparse_crow_indices)
    assert list(scored.sparse_col_indices) == list(sparse.sparse_col_indices)
    cells = scored.to_torch()
    assert (cells[3, 2], cells[5, 0]) == (whole[4], whole[6])
    assert cells[5, 5] < 0, "token 0 is a target as well"
    assert int((cells != 0).sum()) == 3


def test_alternative_tokens_are_drawn_at_every_prompt_position(sdk: Any, sampler: Any) -> None:
    asked = {"prompt_alt_tokens_k": 3, "include_prompt_logprobs": True, "topk_prompt_logprobs": 1}
    greedy = params(sdk, temperature=0.0, max_tokens=1)
    response = sampler.sample(prompt(sdk), 1, greedy, **asked).result()
    drawn = np.array(response.prompt_alt_tokens.tokens.tolist())
    logprobs = np.array(response.prompt_alt_tokens.logprobs.tolist())
    assert drawn.shape == logprobs.shape == (LENGTH - 1, 3)
    for row, values, best in zip(drawn, logprobs, response.topk_prompt_logprobs[1:], strict=True):
        assert set(row) == {best[0][0]}, "temperature 0 draws the likeliest"
        assert set(values) == {best[0][1]}


def test_sequence_ends_at_its_stop(sdk: Any, sampler: Any) -> None:
    free = sampler.sample(prompt(sdk), 1, params(sdk, max_tokens=30)).result().sequences[0]
    assert (len(free.tokens), str(free.stop_reason)) == (30, "length")
    token = free.tokens[6]
    end = list(free.tokens).index(token) + 1
    for stop in ([token], [token, 258], [258, token]):
        ended = sampler.sample(prompt(sdk), 1, params(sdk, max_tokens=30, stop=stop)).result()
        assert plain(ended)[0] == (list(free.tokens)[:end], list(free.logprobs)[:end], "stop")
    letters = [t for t in free.tokens if 32 <= t < 127]
    assert letters, "tokens are bytes, some of them letters"
    text = chr(letters[0])
    ended = sampler.sample(prompt(sdk), 1, params(sdk, max_tokens=30, stop=text)).result()
    assert ended.sequences[0].tokens[-1] == letters[0]
    assert str(ended.sequences[0].stop_reason) == "stop"
    strings = params(sdk, max_tokens=30, stop=["never said", text])
    assert plain(sampler.sample(prompt(sdk), 1, strings).result()) == plain(ended)


def test_empty_stop_disables_the_models_end_token(sdk: Any, sampler: Any) -> None:
    hot = {"temperature": 5.0, "max_tokens": 200}
    endless = sampler.sample(prompt(sdk), 12, params(sdk, **hot)).result()
    assert {reason for _, _, reason in plain(endless)} == {"length"}
    assert any(257 in tokens for tokens, _, _ in plain(endless)), "some say the end token"
    ending = sampler.sample(prompt(sdk), 12, params(sdk, **hot, stop=None)).result()
    for (whole, _, _), (tokens, _, reason) in zip(plain(endless), plain(ending), strict=True):
        end = whole.index(257) + 1 if 257 in whole else 200
        assert (tokens, reason) == (whole[:end], "stop" if 257 in whole else "length")


def test_each_sequence_has_a_unique_id(sdk: Any, sampler: Any) -> None:
    seen = [
        sequence.sequence_id
        for _ in range(2)
        for sequence in sampler.sample(prompt(sdk), 3, params(sdk)).result().sequences
    ]
    assert len(set(seen)) == 6
    assert all(seen)


def test_prompt_that_does_not_fit_is_refused_as_the_hosted_service_does(
    sdk: Any, sampler: Any
) -> None:
    text = r"Prompt length plus max_tokens exceeds the model's context window: 8 \+ 2041 > 2048"
    with pytest.raises(sdk.RequestFailedError, match=text):
        sampler.sample(prompt(sdk), 1, params(sdk, max_tokens=2041)).result()


def test_prompt_with_a_cached_prefix_is_not_computed_again(sdk: Any, client: Any) -> None:
    own = client.create_sampling_client(base_model=MODEL).result()
    shared = [(7 * i) % 250 for i in range(300)]
    first = own.sample(prompt(sdk, shared), 2, params(sdk)).result()
    again = own.sample(prompt(sdk, shared), 2, params(sdk)).result()
    longer = own.sample(prompt(sdk, [*shared, 1, 2]), 1, params(sdk)).result()
    hits = [each.prompt_cache_hit_tokens for each in (first, again, longer)]
    assert hits == [0, 256, 256]
    assert plain(first) == plain(again)
    other = client.create_sampling_client(base_model=MODEL).result()
    alone = other.sample(prompt(sdk, [*shared, 1, 2]), 1, params(sdk)).result()
    assert alone.prompt_cache_hit_tokens == 0
    assert plain(alone) == plain(longer)


def test_neighbours_change_no_number(sdk: Any, client: Any) -> None:
    """Samples of three adapters, cancelled ones and training give the same together and alone."""
    runs = [client.create_lora_training_client(MODEL, rank=4, seed=n).result() for n in (1, 2)]
    for shift, run in enumerate(runs):
        train(sdk, run, 2, shift)
    samplers = [run.save_weights_and_get_sampling_client().result() for run in runs]
    samplers.append(client.create_sampling_client(base_model=MODEL).result())
    alone = [plain(s.sample(prompt(sdk), 3, params(sdk, max_tokens=30)).result()) for s in samplers]
    assert alone[0] != alone[1] != alone[2]
    reference = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    trained = train(sdk, reference, 4)
    together = []
    for _ in range(4):
        together += [s.sample(prompt(sdk), 3, params(sdk, max_tokens=30)) for s in samplers]
        long = samplers[0].sample(prompt(sdk, TEXT * 20), 4, params(sdk, max_tokens=1500))
        long.future().cancel()
    more = train(sdk, runs[0], 2, 2)
    for index, each in enumerate(together):
        assert plain(each.result()) == alone[index % 3]
    assert more == trained[2:], "sampling did not touch the run"


def test_stable_reinforce_trains_on_recorded_samples(sdk: Any, client: Any) -> None:
    run = client.create_lora_training_client(MODEL, rank=4).result()
    sampler = run.save_weights_and_get_sampling_client(record_stability_info=True).result()
    data = []
    for sequence, advantage in zip(
        sampler.sample(prompt(sdk), 2, params(sdk)).result().sequences, (1.0, -1.0), strict=True
    ):
        name, tokens = sequence.sequence_id, list(sequence.tokens)
        start, sampled = sdk.types.PromptProvenanceSpan, sdk.types.SampledProvenanceSpan
        datum = sdk.types.Datum(
            model_input=prompt(sdk, TEXT + tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": [0] * (LENGTH - 1) + tokens,
                "advantages": [0.0] * (LENGTH - 1) + [advantage] * len(tokens),
            },
        )
        data.append(
            datum.with_provenance(
                model_input=[
                    start(sequence_id=name, length=LENGTH),
                    sampled(sequence_id=name, length=len(tokens) - 1),
                ],
                loss_fn_inputs=[
                    start(sequence_id=name, offset=1, length=LENGTH - 1),
                    sampled(sequence_id=name, length=len(tokens)),
                ],
            )
        )
    metrics = run.forward_backward(data, "stable_reinforce").result().metrics
    assert metrics["stable_reinforce/everstep_topr:max"] == 1.0
    assert metrics["stable_reinforce/negative_sequences:sum"] == 1.0
    assert run.optim_step(sdk.AdamParams()).result().metrics["grad_norm"] > 0
