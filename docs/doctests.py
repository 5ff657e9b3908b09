"""Examples of docstrings as code on the site: griffe takes a run of ``>>>`` lines for text, where no heading is above it."""

import re

import griffe

_RUN = re.compile(r"(?:^|(?<=\n\n))(>>> .*?)(?=\n\n(?!>>>)|\Z)", re.DOTALL)


class Doctests(griffe.Extension):
    def on_instance(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = _RUN.sub(r"```pycon\n\1\n```", obj.docstring.value)
