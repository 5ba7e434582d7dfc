"""The numbers of images that the codec codes together: few at first, then as many as the bits so far allow.

The latents of a group are drawn from bits that are already on the stack, and coding the group gives these bits back.
The bits for the first group are random and become part of the message, so this group is small. The sizes of the groups
are written on top of the stack.
"""

import math

from diffusion.ans import Stack

FIRST = 2  # images in the first group, whose latents are drawn from random bits
CAUTION = 0.95  # the part of the bits on the stack that the next group may borrow
GROWTH = (1, 1.2, 1.5, 2)  # the size of the next group, relative to the last one


class Groups:
    """The sizes of the groups in the order of coding.

    Args:
        largest: the most images that a group can have.
        num_words: the number of words of random bits on the stack.

    Attributes:
        size: the number of images in the next group, if that many are left.
        lowest: the fewest words that the stack has held; below them are random bits that were not used.
    """

    def __init__(self, largest: int, num_words: int = 0):
        self.size, self.lowest = min(FIRST, largest), num_words
        self._largest = largest
        self._borrowed = 0.0  # words per image, the most in any group
        self._growth: list[int] = []

    def grow(self, num_images: int, before: int, lowest: int, after: int) -> None:
        """Chooses the size of the next group from the words on the stack before, while and after one was coded."""
        self.lowest = min(self.lowest, lowest)
        # A few images of a few numbers borrow less than a whole word.
        self._borrowed = max(self._borrowed, max(before - lowest, 1) / num_images)
        affordable = CAUTION * (after - self.lowest) / self._borrowed
        chosen = max(n for n in range(len(GROWTH)) if n == 0 or self._grown(n) <= affordable)
        self._growth.append(chosen)
        self.size = self._grown(chosen)

    def push(self, stack: Stack) -> None:
        """Writes the growth of the groups. Call it after the last group."""
        for n in self._growth[-2::-1]:
            stack.push_number(n, len(GROWTH))

    def pop(self, stack: Stack, num_images: int) -> list[int]:
        """Reads the sizes of all groups of this many images from what `push` wrote."""
        sizes: list[int] = []
        while missing := num_images - sum(sizes):
            sizes.append(min(self.size, missing))
            if missing > self.size:
                self.size = self._grown(stack.pop_number(len(GROWTH)))
        return sizes

    def _grown(self, n: int) -> int:
        return min(math.ceil(self.size * GROWTH[n]), self._largest)
