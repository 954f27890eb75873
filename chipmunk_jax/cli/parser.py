"""How a command line is read: the layout of its help, and mistakes told in one sentence with the nearest known name."""

import argparse
from collections.abc import Mapping, Sequence
from typing import NoReturn

from chipmunk_jax.errors import nearest, sentence

# The flags of what a call of a pipeline, or a setting of a sample, has another name for.
FLAGS = {
    **{name: f"--{name.replace('_', '-')}" for name in (
        "batch", "fps", "frames", "guidance", "height", "max_sequence_length", "negative_prompt", "prompt_2", "seed", "solver",
        "steps", "width",
    )},
    "guidance_scale": "--guidance",
    "guidance_scale_2": "--guidance-2",
    "num_frames": "--frames",
    "num_images_per_prompt": "--batch",
    "num_inference_steps": "--steps",
    "num_videos_per_prompt": "--batch",
    "true_cfg_scale": "--true-cfg",
}  # fmt: skip
NOT_HERE = {"--image": "image to image and image to video are not here yet"}


class Parser(argparse.ArgumentParser):
    """The arguments of one command; a mistake ends the process with status 2."""

    def __init__(self, prog: str, usage: str, *, description: str, epilog: str = "") -> None:
        """Args:
        prog: the command, as "chipmunk sample".
        usage: the arguments, as they follow the command.
        description, epilog: printed by --help as they are.
        """
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """The arguments; an unknown flag is told before the arguments that are missing, which may be what it should say."""
        for word in args:
            if word == "--":
                break
            if flag := self._unknown(word):
                self.error(f"unknown flag {flag}; {self._hint(flag)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2, after one sentence and the usage."""
        self.exit(2, f"{self.prog}: {sentence(message)}\n{self.format_usage()}")

    def _hint(self, flag: str) -> str:
        """What to write in place of an unknown flag."""
        known = self._option_string_actions
        ours = FLAGS.get(flag.lstrip("-").replace("-", "_"))
        asked = f"did you mean {ours}?" if ours in known else NOT_HERE.get(flag) or nearest(flag, known)
        return asked or f"`{self.prog} --help` lists all"

    def _unknown(self, word: str) -> str:
        """The flag that a word is, where there is no such flag; else ""."""
        flag, known = word.partition("=")[0], self._option_string_actions
        if flag in known or " " in flag:  # with a space it is a value
            return ""
        if word.startswith("--"):
            return flag
        short = word[:1] == "-" and word[1:2].isalpha()  # else a value, such as a negative number
        return flag if short and word[:2] not in known else ""


class Menu(Parser):
    """Several commands under one name, none of them imported yet."""

    def __init__(self, prog: str, title: str, commands: Mapping[str, str], *, description: str, epilog: str) -> None:
        """Args:
        prog: the name above them, as "chipmunk bench".
        title: of their list in the help.
        commands: what each does, by name.
        description, epilog: printed by --help as they are.
        """
        width = max(map(len, commands))
        lines = (f"  {name:<{width}}  {what}" for name, what in commands.items())
        description = "\n".join([f"{description}\n\n{title}:", *lines])
        super().__init__(prog, "COMMAND [options]", description=description, epilog=epilog)
        self.commands = commands

    def choose(self, words: Sequence[str]) -> tuple[str, Sequence[str]]:
        """The command that the words name first, and the words after it. Help and mistakes end the process."""
        known = ", ".join(self.commands)
        if words and words[0] in self.commands:
            return words[0], words[1:]
        if words and not words[0].startswith("-"):
            hint = nearest(words[0], self.commands) or f"expected one of {known}"
            self.error(f"unknown command {words[0]!r}; {hint}")
        self.parse_args(words)
        self.error(f"no command: expected one of {known}")
