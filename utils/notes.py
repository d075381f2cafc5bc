"""What a command took for granted because no file and no option said it: logged once, and kept for results.json."""

from collections.abc import Callable


class Notes:
    """Remarks of one command. `log` prints a line; without it nothing is printed.

    `assume` is for what could be wrong: a guess is only fair if the reader of a number can see it. `state` is for what
    was read from a file or an option, such as the normalisation of the images.
    """

    def __init__(self, log: Callable[[str], None] | None = None):
        self.log = log or (lambda line: None)
        self.assumed: dict[str, str] = {}
        self.stated: dict[str, object] = {}

    def assume(self, topic: str, sentence: str) -> None:
        """Keep under `assumed` that `topic` was taken to be what `sentence` says."""
        if self.assumed.get(topic) == sentence:
            return
        self.assumed[topic] = sentence
        self.log(f"assumed: {sentence}")

    def state(self, topic: str, value: object, sentence: str) -> None:
        """Keep `value` as a key of the results, and log the sentence."""
        if topic in self.stated and self.stated[topic] == value:
            return
        self.stated[topic] = value
        self.log(sentence)

    def results(self) -> dict:
        """Return the keys these remarks add to results.json; none where there is nothing to say."""
        return self.stated | ({"assumed": self.assumed} if self.assumed else {})
