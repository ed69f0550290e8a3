from fastweights.data import pack, standard_library_docstrings, topic_documents


def test_both_texts_are_there_and_share_nothing():
    train, held_out = standard_library_docstrings(), topic_documents()
    assert sum(map(len, train)) > 1_000_000 and sum(map(len, held_out)) > 300_000
    in_order = standard_library_docstrings(seed=None)
    assert train != in_order and sorted(train) == sorted(in_order)
    lines = {line for text in train for line in text.splitlines() if len(line) > 60}
    assert not [line for text in held_out for line in text.splitlines() if line in lines]


def test_pack_puts_documents_one_after_another(tokenizer):
    assert pack(tokenizer, ["w5 w9", "w7"]).tolist() == [5, 9, 7]
