"""Where each kind of post goes: upstream where there is a token for it, else into the outbox."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tasks.manifest import Upstream
from tasks.publish.base import OpensPullRequests, Publisher
from tasks.publish.outbox import Outbox
from tasks.publish.requested import is_public
from tasks.settings import Settings

if TYPE_CHECKING:
    from tasks.publish.github import GitHubPublisher
    from tasks.publish.hub import HubPublisher

_ON_THE_HUB = "/discussions/"
"""What the addresses of the Hub's pull requests have."""
_ON_MAIN = "/blob/"
"""What the addresses of files have that were there already (`NothingNewError`)."""


def sends_to_hub(options: Settings) -> bool:
    """Return whether the dataset's pull requests are sent, and not put into the outbox."""
    return options.publish.to != "outbox" and options.hf_token is not None


def sends_to_github(options: Settings) -> bool:
    """Return whether all else is sent, and not put into the outbox."""
    return options.publish.to != "outbox" and options.github_token is not None


@dataclass(frozen=True)
class Publishers:
    """Everything that publishes, as far as there are tokens."""

    outbox: Outbox
    hub: HubPublisher | None = None
    github: GitHubPublisher | None = None

    @classmethod
    def of(cls, options: Settings) -> Publishers:
        """Return what the settings allow."""
        outbox, locks = Outbox(options.outbox), options.workspace / ".cache" / "publishing"
        hub, github = None, None
        if options.hf_token and sends_to_hub(options):
            from tasks.publish.hub import HubPublisher  # its client takes a second to import

            hub = HubPublisher(
                options.publish.dataset, options.hf_token, options.hf_endpoint, locks
            )
        if options.github_token and sends_to_github(options):
            from tasks.publish.github import GitHubPublisher

            github = GitHubPublisher(options.publish.github_url, options.github_token, locks)
        return cls(outbox, hub, github)

    @property
    def for_the_dataset(self) -> OpensPullRequests:
        """What opens the dataset's pull requests."""
        return self.hub or self.outbox

    @property
    def for_branches(self) -> OpensPullRequests:
        """What opens pull requests of git branches."""
        return self.github or self.outbox

    @property
    def for_issues(self) -> Publisher:
        """What opens issues."""
        return self.github or self.outbox

    def state_of(self, url: str) -> Upstream | None:
        """Return what has become of something published; None if nobody here can ask.

        Raises:
            PublishError: it is gone, or its site does not answer.
        """
        if not is_public(url):
            return Upstream(state="manual")
        if _ON_MAIN in urlsplit(url).path:
            return Upstream(state="merged")
        site = self.hub if _ON_THE_HUB in urlsplit(url).path else self.github
        return site.state_of(url) if site else None
