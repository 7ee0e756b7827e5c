"""Labels, counted losses, document starts and positions, against rows worked out by hand."""

import torch

from megatron_ttt.data.rows import Batch, make_batch

EOD, PAD = 9, 8
T, F = True, False


def make(rows: list[list[int]], **options: bool) -> Batch:
    return make_batch(torch.tensor(rows), list(range(len(rows))), eod=EOD, pad=PAD, **options)


def test_documents_inside_a_row() -> None:
    batch = make([[1, 2, EOD, 3, EOD, 4, 5]])
    assert batch.tokens_BT.tolist() == [[1, 2, EOD, 3, EOD, 4]]
    assert batch.labels_BT.tolist() == [[2, EOD, 3, EOD, 4, 5]]
    assert batch.document_starts_BT.tolist() == [[T, F, F, T, F, T]]
    assert batch.padding_BT.tolist() == [[F] * 6]
    assert batch.loss_mask_BT.tolist() == [[T] * 6]


def test_loss_across_a_boundary_is_left_out_on_request() -> None:
    batch = make([[1, EOD, 3, EOD, 4, 5]], mask_document_end=True)
    # predicting EOD counts; predicting 3 and 4 from the EOD before them does not
    assert batch.loss_mask_BT.tolist() == [[T, F, T, F, T]]


def test_padding_between_documents_belongs_to_neither() -> None:
    batch = make([[1, EOD, PAD, PAD, 3, 4, EOD, PAD, 5]])
    assert batch.document_starts_BT.tolist() == [[T, F, F, F, T, F, F, F]]
    assert batch.padding_BT.tolist() == [[F, F, T, T, F, F, F, T]]
    # places 1, 2 and 6 predict padding, places 2, 3 and 7 predict from padding
    assert batch.loss_mask_BT.tolist() == [[T, F, F, F, T, T, F, F]]


def test_a_row_that_opens_with_padding_starts_twice() -> None:
    batch = make([[PAD, PAD, 3, 4, EOD, 5]])
    assert batch.document_starts_BT.tolist() == [[T, F, T, F, F]]


def test_padding_inside_a_document_starts_nothing() -> None:
    batch = make([[1, PAD, 2, PAD, PAD, 3, EOD]])
    assert batch.document_starts_BT.tolist() == [[T, F, F, F, F, F]]


def test_a_row_of_padding_alone() -> None:
    batch = make([[PAD] * 5, [1, 2, EOD, 4, 5]])
    assert batch.document_starts_BT.tolist() == [[T, F, F, F], [T, F, F, T]]
    assert batch.loss_mask_BT.tolist() == [[F] * 4, [T] * 4]


def test_without_a_pad_id_every_token_is_real() -> None:
    batch = make_batch(torch.tensor([[1, EOD, PAD, 3]]), [5], eod=EOD, pad=None)
    assert batch.padding_BT.tolist() == [[F] * 3]
    assert batch.document_starts_BT.tolist() == [[T, F, T]]
    assert batch.sample_ids_B.tolist() == [5]


def test_types_and_layout() -> None:
    batch = make([[1, 2, 3], [4, EOD, 6]])
    for tensor in (batch.tokens_BT, batch.labels_BT, batch.sample_ids_B):
        assert tensor.dtype is torch.int64
        assert tensor.is_contiguous()
    for tensor in (batch.loss_mask_BT, batch.document_starts_BT, batch.padding_BT):
        assert tensor.dtype is torch.bool
    assert torch.equal(batch.to("cpu").tokens_BT, batch.tokens_BT)


def test_equal_to_a_loop_over_random_rows() -> None:
    """The vectorised form against the definition, token by token."""
    generator = torch.Generator().manual_seed(3)
    text_BR = torch.randint(6, 10, (40, 33), generator=generator)
    batch = make_batch(text_BR, list(range(40)), eod=EOD, pad=PAD)
    for row, text in enumerate(text_BR.tolist()):
        last_real = None
        for place, token in enumerate(text[:-1]):
            real = token != PAD
            starts = place == 0 or (real and (last_real is None or last_real == EOD))
            assert bool(batch.document_starts_BT[row, place]) == starts
            assert bool(batch.loss_mask_BT[row, place]) == (real and text[place + 1] != PAD)
            last_real = token if real else last_real
