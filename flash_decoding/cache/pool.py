"""The pages of a paged cache: which are free, and how many rows use each of the others (host only)."""

from __future__ import annotations

from collections.abc import Iterable

NO_PAGE = 0
"""The page that belongs to nobody: unused entries of a block table point to it."""


class PagePool:
    """Pages 1 to ``num_pages``, handed out one by one and counted."""

    def __init__(self, num_pages: int) -> None:
        self._users = [0] * (num_pages + 1)
        self._free = list(range(num_pages, NO_PAGE, -1))

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    def users(self, page: int) -> int:
        """How many rows use a page."""
        return self._users[page]

    def take(self, count: int) -> list[int]:
        """Hand out free pages; the caller has seen to it that there are so many."""
        pages = [self._free.pop() for _ in range(count)]
        self.share(pages)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Count one more user of each of these pages."""
        for page in pages:
            self._users[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Count one user less of each of these pages; one without users is free again."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free.append(page)
