"""`mixmae recipes`: the recipes that ship with the package; `mixmae recipes show NAME` prints one to copy."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mixmae.trainer.recipe.library import find_recipe, library


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae recipes", description=__doc__)
    commands = parser.add_subparsers(metavar="show NAME")
    show = commands.add_parser("show", help="print a recipe: mixmae recipes show pretrain/swin_base > my_recipe.yaml")
    show.add_argument("name", type=Path, help="as 'mixmae recipes' lists it")
    args = parser.parse_args(argv)
    if "name" in args:
        print(find_recipe(args.name).read_text(), end="")
        return 0
    recipes = library()
    width = max(map(len, recipes))
    for name, recipe in recipes.items():
        print(f"{name:<{width}}  {recipe.summary}")
    return 0
