"""The checks of declared types and axes that conftest switches on: jaxtyping and beartype, on every public function and class.

Functions inside of functions are left alone, because they would be wrapped anew at each call.
"""

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import _import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a float, too, as in PEP 484


class Public(_import_hook.JaxtypingTransformer):
    """Wraps the functions of modules and classes whose name begins with no underscore."""

    def visit_FunctionDef(self, node):
        if node.name.startswith("_") and not node.name.startswith("__"):
            return node
        body, node.body = node.body, []  # what is not there is not visited
        super().visit_FunctionDef(node)
        node.body = body
        return node


def switch_on() -> None:
    """Checks every module of refusal_jax that is imported from now on."""
    _import_hook.JaxtypingTransformer = Public
    jaxtyping.install_import_hook("refusal_jax", "typechecker.checked")
