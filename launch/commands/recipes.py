"""`mixmae recipes`: those that ship; `recipes show NAME` prints one to copy, `recipes suggest SHARDS` writes one."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from mixmae.trainer.recipe.library import find_recipe, library

_SUGGEST = "mixmae.trainer.planning.suggest"
"""Imported only when it is called for: it needs torch."""


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["suggest"]:
        return int(importlib.import_module(_SUGGEST).main(argv[1:]))
    parser = argparse.ArgumentParser(prog="mixmae recipes", description=__doc__)
    commands = parser.add_subparsers(metavar="show NAME | suggest SHARDS --gpus N")
    show = commands.add_parser("show", help="print a recipe: mixmae recipes show pretrain/swin_base > my_recipe.yaml")
    show.add_argument("name", type=Path, help="as 'mixmae recipes' lists it")
    commands.add_parser("suggest", help="write a recipe for SHARDS and N GPUs, with its reasons", add_help=False)
    args = parser.parse_args(argv)
    if "name" in args:
        print(find_recipe(args.name).read_text(), end="")
        return 0
    recipes = library()
    width = max(map(len, recipes))
    for name, recipe in recipes.items():
        print(f"{name:<{width}}  {recipe.summary}")
    return 0
