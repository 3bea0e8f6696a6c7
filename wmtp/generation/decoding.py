"""Greedy decoding with head 1, for many prompts of different lengths at once."""

import torch

from wmtp.models.mtp import MtpModel


@torch.inference_mode()
def greedy(model: MtpModel, prompts: list[list[int]], max_new_tokens: int, end: int) -> list[list[int]]:
    """The most likely continuation of each prompt, without the end token, of at most `max_new_tokens`.

    Prompts are padded on the right: a padded position is overwritten in the cache by the token that
    later takes it, and until then no query may see it.
    """
    device = model.unembedding.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    tokens = torch.full((len(prompts), longest), end, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    positions = torch.arange(longest, device=device).expand_as(tokens)
    cache = model.new_cache(len(prompts), longest + max_new_tokens)
    was_training = model.training
    model.eval()
    states = model.next_token_states(tokens, positions, cache)
    states = states[torch.arange(len(prompts), device=device), lengths - 1]
    chosen: list[torch.Tensor] = []
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        chosen.append(model.unembedding(states).argmax(dim=-1))
        running &= chosen[-1] != end
        if not running.any() or step + 1 == max_new_tokens:
            break
        states = model.next_token_states(chosen[-1][:, None], (lengths + step)[:, None], cache)[:, 0]
    model.train(was_training)
    rows = torch.stack(chosen, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
