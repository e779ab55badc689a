"""Switches as docker takes them: `--rm`, and also `--rm=true` and `--rm=false`."""

from typing import Any

import click

_ON, _OFF = frozenset(("true", "1")), frozenset(("false", "0"))


class SwitchCommand(click.Command):
    """A command whose switches may be given a value after an equals sign."""

    def make_parser(self, ctx: click.Context) -> Any:
        """click's own, asked to try again without a value that a switch does not take."""
        parser = super().make_parser(ctx)
        switches = {
            name: option
            for option in self.params
            if isinstance(option, click.Option) and option.is_flag and not option.count
            for name in option.opts
            if name.startswith("--")
        }
        match = parser._match_long_opt  # noqa: SLF001 - click has no other way in

        def match_switch(opt: str, explicit_value: str | None, state: Any) -> None:
            option = switches.get(opt)
            if option is None or explicit_value is None:
                match(opt, explicit_value, state)
            elif explicit_value.lower() in _ON:
                match(opt, None, state)
            elif explicit_value.lower() not in _OFF:
                raise click.BadOptionUsage(opt, f"{opt} is true or false, not {explicit_value!r}", ctx=ctx)
            elif option.secondary_opts:
                match(option.secondary_opts[0], None, state)

        parser._match_long_opt = match_switch  # type: ignore[method-assign]  # noqa: SLF001
        return parser
