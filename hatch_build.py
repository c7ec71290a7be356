"""Fills what a package index shows: the README with absolute links, and the project's addresses.

Both are made from one setting, `repository` in `pyproject.toml`.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE_LINK = re.compile(r"(?<=\]\()(?!https?:|#)")


def absolute_links(text: str, repository: str) -> str:
    """Returns Markdown in which links to files of the repository work wherever it is shown."""
    return RELATIVE_LINK.sub(f"{repository}/blob/main/", text)


class AddressHook(MetadataHookInterface):
    """Found by hatchling, which builds the packages."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict) -> None:
        """Sets `readme` and `urls`."""
        repository = self.config["repository"]
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute_links(text, repository),
        }
        metadata["urls"] = {
            "Source": repository,
            "Documentation": f"{repository}/tree/main/docs",
            "Changelog": f"{repository}/blob/main/CHANGELOG.md",
            "Issues": f"{repository}/issues",
        }
