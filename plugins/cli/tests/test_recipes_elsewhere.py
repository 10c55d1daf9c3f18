"""Names that other commands have for keys of a recipe."""

import attrs

from tunerkit_cli.recipes import elsewhere
from tunerkit_cli.recipes.recipe import Recipe
from tunerkit_cli.recipes.setting import FLAGS
from tunerkit_cli.recipes.trainer_arguments import argument_types
from tunerkit_lora import LoraConfig


def test_each_name_leads_to_one_key_that_exists() -> None:
    """Law: a hint is a key of the recipe, an argument of the trainer or a setting of LoRA."""
    settings = {f"config.{field.name}" for field in attrs.fields(LoraConfig)}
    keys = {field.name for field in attrs.fields(Recipe)}
    known = {*keys, *settings, *(f"training.{name}" for name in argument_types()), *FLAGS.values()}
    assert {key.partition("=")[0] for key in elsewhere._KEYS} <= known
    names = [name for others in elsewhere._KEYS.values() for name in others]
    assert len({*names}) == len(names)
    assert not keys & {*names}


def test_an_argument_of_the_trainer_leads_to_its_section() -> None:
    """It is the mistake of those who know transformers."""
    assert elsewhere.key_for("weight_decay") == "training.weight_decay"
    assert elsewhere.key_for("load_in_4bit") == "quantisation=nf4"
    assert elsewhere.key_for("zzz") is None
