"""Fields of the wrong type in a stranger's config are refused in our words: the file, the field, what is allowed."""

import json

import pytest
from support.command_line import refused

CONFIG, GENERATION = "config.json", "generation_config.json"
ID, IDS, FLAG, NUMBER, ABOVE, REFUSED = (
    "must be a token's id;", "must be a token's id or a list of them;", "must be true or false;", "must be a number;",
    "must be a number above 0;", "does not take: mend it",
)  # fmt: skip
CASES = [
    (CONFIG, "bos_token_id", "x", ID),
    (CONFIG, "bos_token_id", [1], ID),
    (CONFIG, "eos_token_id", {"a": 1}, IDS),
    (CONFIG, "eos_token_id", ["x"], IDS),
    (CONFIG, "eos_token_id", 10**400, IDS),
    (CONFIG, "pad_token_id", 99999, "must be below 320;"),
    (CONFIG, "num_hidden_layers", "4", "must be a whole number of 0 to 4096;"),
    (CONFIG, "layer_types", 3, "must be a list of names;"),
    (CONFIG, "layer_types", ["x"], REFUSED),
    (CONFIG, "rope_scaling", [], "must be default, linear,"),
    (CONFIG, "rope_scaling", {"rope_type": "llama3", "factor": 2}, REFUSED),
    (CONFIG, "rope_parameters", [], "must be an object;"),
    (CONFIG, "rope_parameters", {"rope_type": []}, "must be a name;"),
    (CONFIG, "rope_parameters", {"rope_type": "default", "rope_theta": "x"}, ABOVE),
    (CONFIG, "rope_parameters", {"full_attention": {"rope_theta": 0}}, ABOVE),
    (CONFIG, "tie_word_embeddings", "x", FLAG),
    (CONFIG, "attention_bias", 1, FLAG),
    (CONFIG, "attention_dropout", "x", NUMBER),
    (CONFIG, "id2label", {"a": "b"}, REFUSED),
    (CONFIG, "text_config", {}, "must be null: it is of models of several parts;"),
    (CONFIG, "to_dict", 3, REFUSED),
    (GENERATION, "eos_token_id", {"a": 1}, IDS),
    (GENERATION, "pad_token_id", "x", ID),
    (GENERATION, "temperature", "hot", NUMBER),
    (GENERATION, "max_new_tokens", "x", "must be a whole number of at least 0;"),
    (GENERATION, "compile_config", 3, REFUSED),
]


@pytest.mark.parametrize(("file", "field", "value", "allowed"), CASES)
def test_a_field_of_another_type_is_refused_by_name(file, field, value, allowed, tiny_model, tmp_path):
    model = tiny_model("model")
    document = json.loads((model / file).read_text()) if (model / file).is_file() else {}
    (model / file).write_text(json.dumps(document | {field: value}))
    line = refused("export", model, "-o", tmp_path / "bundle", "--parity", "none")
    name = {ABOVE: "rope_theta", "must be a name;": "rope_type"}.get(allowed, field)
    assert f"{file} has {name} " in line and allowed in line
    assert line == refused("eval", model, "--text", model / "LICENSE", "--chunk", 32)


@pytest.mark.parametrize("file", [CONFIG, GENERATION])
def test_a_number_of_many_digits_is_refused(file, tiny_model, tmp_path):
    model = tiny_model("model")
    (model / file).write_text('{"hidden_size": ' + "1" * 5000 + "}")
    line = refused("export", model, "-o", tmp_path / "bundle", "--parity", "none")
    assert line.startswith(f"saap: {model / file} is damaged (a number has more than 4300 digits): ")


@pytest.mark.parametrize("file", [CONFIG, GENERATION])
@pytest.mark.parametrize("depth", [150, 930, 960])
def test_a_deeply_nested_field_is_refused(file, depth, tiny_model, tmp_path):
    model = tiny_model("model")
    nested = '{"rope_a": ' * depth + "1" + "}" * depth
    (model / file).write_text('{"model_type": "llama", "rope_scaling": ' + nested + "}")
    line = refused("export", model, "-o", tmp_path / "bundle", "--parity", "none")
    assert line.startswith(f"saap: {model / file} is damaged (nested too deeply): ")
