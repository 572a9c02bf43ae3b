"""Steps that need no GPU: what the guard compares and poisons, with one fault each."""

import torch

from dsv4.engine.guard import bits

SLOTS, ROOM, WIDTH = 6, 8, 3


class NotebookStep:
    """Writes its token beside a slot's earlier ones and answers with their sum."""

    def __init__(self, subject, rows):
        self.subject, self.rows, self.graph = subject, rows, None
        self.slots = torch.full((rows,), -1)
        self.values = torch.zeros(rows, WIDTH)
        self.sums = torch.zeros(rows, WIDTH)

    def stage(self, slots, tokens):
        self.slots.fill_(-1)[: len(slots)] = torch.tensor(slots)
        self.values[: len(slots)] = torch.tensor(tokens, dtype=torch.float32).unsqueeze(-1)

    def body(self):
        for row, slot in enumerate(self.slots.tolist()):
            if slot >= 0:
                length = self.subject.held[slot]
                self.subject.pages[slot, length] = self.values[row]
                self.sums[row] = self.seen(slot, length)

    def seen(self, slot, length):
        return self.subject.pages[slot, : length + 1].sum(0)

    def capture(self):
        pass

    def replay(self):
        self.body()

    def outputs(self):
        return {"sums": self.sums}


class StaleReplay(NotebookStep):
    def replay(self):
        self.values += 1
        self.body()


class MakesNaN(NotebookStep):
    def seen(self, slot, length):
        return super().seen(slot, length) / 0 * 0


class ReadsAll(NotebookStep):
    def seen(self, slot, length):
        return self.subject.pages[slot].sum(0)


class PaddingWrites(NotebookStep):
    def replay(self):
        self.body()
        if (self.slots < 0).any():
            self.subject.pages[-1, 0] = 1.0  # slot -1, read as an index


class Notebook:
    """Slots of ROOM rows; a slot's past is its first rows."""

    def __init__(self, make=NotebookStep):
        self.make, self.held = make, {}
        self.pages = torch.arange(SLOTS * ROOM * WIDTH).float().view(SLOTS, ROOM, WIDTH)

    def step(self, rows):
        return self.make(self, rows)

    def lengths(self):
        return [0, 1, 3, 5]

    def place(self, lengths):
        self.held = dict(enumerate(lengths))
        return list(self.held)

    def tokens(self, count):
        return [100 + i for i in range(count)]

    def memory(self):
        return {"pages": self.pages}

    def unread(self, slots):
        mask = torch.ones(SLOTS, ROOM, dtype=torch.bool)
        for slot in slots:
            mask[slot, : self.held[slot]] = False
        return {"pages": mask}

    def writes(self, slots):
        mask = torch.zeros(SLOTS, ROOM, dtype=torch.bool)
        for slot in slots:
            mask[slot, self.held[slot]] = True
        return {"pages": mask}


def bit_findings(subject, rows=4, live=2):
    """All rows live, replay beside eager; then `live` of them among poison."""
    step, slots, tokens = subject.step(rows), subject.place(subject.lengths()[:rows]), subject.tokens(rows)
    found = bits.compare(step, subject, slots, tokens, "all live")
    return found + bits.poisoned(step, subject, slots[:live], tokens[:live], "some live")
