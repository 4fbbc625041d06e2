"""The kinds of screens: each draws one with random content, and says the task and the right action."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from screen_canvas import HEIGHT, MARGIN, STATUS_BAR, THEMES, TITLE_BAR, WIDTH, Box, Canvas

LANGUAGES = ("en", "zh")
TOP = STATUS_BAR + TITLE_BAR
SWIPE_UP = 'do(action="Swipe", start=[500,750], end=[500,250])'
Pair = Sequence[str]
"""The same words in each of LANGUAGES."""


@dataclass(frozen=True)
class Step:
    """A screen, the task that it is a step of, and the action with the reason for it.

    `target` is the element that is tapped, None for other actions.
    """

    canvas: Canvas
    app: str
    task: str
    reason: str
    action: str
    target: str | None = None


@dataclass(frozen=True)
class Writer:
    """Draws words for one screen in one language."""

    rng: random.Random
    language: int
    words: dict[str, Any]

    def say(self, pair: Pair) -> str:
        """The words in the language."""
        return pair[self.language]

    def phrase(self, name: str) -> str:
        """A fixed phrase in the language."""
        return self.say(self.words["phrases"][name])

    def some(self, name: str, number: int) -> list[str]:
        """Different entries of a list, in the language."""
        return [self.say(pair) for pair in self.rng.sample(self.words[name], number)]

    def app(self, name: str) -> str:
        """The name of an app by its English name."""
        return next(self.say(pair) for pair in self.words["apps"] if pair[0] == name)

    def canvas(self, title: str, back: bool = True) -> Canvas:
        """A screen with its two bars."""
        canvas = self.bare()
        canvas.title_bar(title, back)
        return canvas

    def bare(self) -> Canvas:
        """A screen with the status bar alone."""
        canvas = Canvas(self.rng.choice(THEMES))
        canvas.status_bar(f"{self.rng.randrange(24):02d}:{self.rng.randrange(60):02d}", self.rng.randint(5, 100))
        return canvas


def tap(canvas: Canvas, name: str) -> str:
    """The action that taps the middle of an element: coordinates from 0 to 999 for any size of screen."""
    left, top, right, bottom = canvas.elements[name]
    return f'do(action="Tap", element=[{(left + right) * 500 // WIDTH},{(top + bottom) * 500 // HEIGHT}])'


def typed(text: str) -> str:
    """The action that types a text."""
    return f'do(action="Type", text="{text}")'


def finished(message: str) -> str:
    """The action that ends the task."""
    return f'finish(message="{message}")'


def tapping(canvas: Canvas, name: str, app: str, task: str, reason: str) -> Step:
    """A step that taps an element."""
    return Step(canvas, app, task, reason, tap(canvas, name), name)


def looking_further(draw: Writer, canvas: Canvas, name: str, app: str, task: str) -> Step:
    """A step that swipes up, as what is looked for is not on the screen."""
    reason = (f"{name} is not on the screen: look further down.", f"屏幕上没有{name}，往下找。")[draw.language]
    return Step(canvas, app, task, reason, SWIPE_UP)


def row_boxes(number: int, top: int = TOP + 8, height: int = 62) -> list[Box]:
    """The boxes of rows below each other."""
    return [(0, top + height * place, WIDTH, top + height * (place + 1) - 1) for place in range(number)]


def settings(draw: Writer) -> Step:
    """Switches and pages of the settings."""
    app, count = draw.app("Settings"), draw.rng.randint(6, 9)
    switches = draw.some("settings", count // 2 + 1)
    pages = draw.some("pages", count - len(switches))
    names = draw.rng.sample([*switches, *pages], count)
    on = {name: draw.rng.random() < 0.5 for name in switches}
    canvas = draw.canvas(app)
    for number, (name, box) in enumerate(zip(names, row_boxes(count), strict=True)):
        _, top, _, bottom = canvas.add(name, box)
        middle = (top + bottom) // 2
        canvas.rectangle(box, canvas.theme.card)
        canvas.icon((MARGIN, middle - 14, MARGIN + 28, middle + 14), draw.rng.randrange(30))
        canvas.text((MARGIN + 40, middle), name, 15, canvas.theme.ink)
        if name in on:
            canvas.switch((WIDTH - 58, middle - 12, WIDTH - 14, middle + 12), on[name])
        else:
            canvas.text((WIDTH - 16, middle), "›", 20, canvas.theme.faint, "rm")
        canvas.line(MARGIN + 40, WIDTH, bottom + number % 2)
    name = draw.rng.choice(names)
    if name not in on:
        task, reason = (
            (f"Open the {name} page of the settings.", f"{name} is in the list."),
            (f"打开设置里的“{name}”页面。", f"列表里有“{name}”。"),
        )[draw.language]
        return tapping(canvas, name, app, task, reason)
    wanted = draw.rng.random() < 0.5
    state = draw.phrase("enabled" if wanted else "disabled")
    task = (f"Turn {state} {name}.", f"{'打开' if wanted else '关闭'}“{name}”。")[draw.language]
    if on[name] is wanted:
        reason = (f"{name} is {state} already.", f"“{name}”已经是{state}的。")[draw.language]
        return Step(canvas, app, task, reason, finished(reason))
    reason = (f"{name} is not {state}: tap its switch.", f"“{name}”还不是{state}的，点它的开关。")[draw.language]
    return tapping(canvas, name, app, task, reason)


def chats(draw: Writer) -> Step:
    """A list of chats, in which the person may be further down."""
    app, count = draw.app("Messages"), draw.rng.randint(5, 7)
    people = draw.some("people", count + 1)
    canvas = draw.canvas(draw.phrase("chats"), back=False)
    for name, box in zip(people[:count], row_boxes(count), strict=True):
        _, top, _, bottom = canvas.add(name, box)
        middle = (top + bottom) // 2
        canvas.rectangle(box, canvas.theme.card)
        canvas.icon((MARGIN, middle - 20, MARGIN + 40, middle + 20), draw.rng.randrange(30))
        canvas.text((MARGIN + 52, middle - 10), name, 15, canvas.theme.ink)
        canvas.text((MARGIN + 52, middle + 12), draw.some("messages", 1)[0], 12, canvas.theme.faint)
        clock = f"{draw.rng.randrange(24):02d}:{draw.rng.randrange(60):02d}"
        canvas.text((WIDTH - 14, middle - 10), clock, 11, canvas.theme.faint, "rm")
    name = draw.rng.choice([*people[:count], *[people[count]] * (count // 3)])
    task = (f"Open the chat with {name}.", f"打开和{name}的聊天。")[draw.language]
    if name == people[count]:
        return looking_further(draw, canvas, name, app, task)
    reason = (f"{name} is in the list.", f"列表里有{name}。")[draw.language]
    return tapping(canvas, name, app, task, reason)


def conversation(draw: Writer) -> Step:
    """One chat, with an input that is idle, focused, or filled."""
    app, (name,), said = draw.app("Messages"), draw.some("people", 1), draw.some("messages", 5)
    state, wanted = draw.rng.choice(("idle", "focused", "filled")), said.pop()
    canvas = draw.canvas(name)
    for number, words in enumerate(said[: 4 if state == "idle" else 3]):
        width, top = min(240, 26 + len(words) * (14 if draw.language else 8)), TOP + 20 + 64 * number
        mine = draw.rng.random() < 0.5
        left = WIDTH - MARGIN - width if mine else MARGIN
        canvas.rectangle((left, top, left + width, top + 44), canvas.theme.accent if mine else canvas.theme.card, 12)
        ink = canvas.theme.card if mine else canvas.theme.ink
        canvas.text((left + 12, top + 22), words, 13, ink)
    bottom = HEIGHT - 16
    if state != "idle":
        canvas.keyboard()
        bottom = HEIGHT - 200
    text = wanted if state == "filled" else ""
    hint = ("Message", "消息")[draw.language]
    canvas.entry("entry", (MARGIN, bottom - 40, WIDTH - 84, bottom), text, hint, state != "idle")
    canvas.button("send", (WIDTH - 76, bottom - 40, WIDTH - MARGIN, bottom), draw.phrase("send"))
    task = (f"Write to {name}: {wanted}", f"给{name}发消息：{wanted}")[draw.language]
    if state == "idle":
        return tapping(canvas, "entry", app, task, ("Focus the input first.", "先点输入框。")[draw.language])
    if state == "focused":
        return Step(canvas, app, task, ("The input is focused.", "输入框已激活。")[draw.language], typed(wanted))
    return tapping(canvas, "send", app, task, ("The text is there: send it.", "内容已输入，发送。")[draw.language])


def form(draw: Writer) -> Step:
    """Inputs to fill one after the other, and a button."""
    app, given = draw.some("apps", 1)[0], draw.rng.choice(draw.words["forms"])
    fields = draw.rng.sample(draw.words["fields"], 4)
    labels = [draw.say(field["label"]) for field in fields]
    values = [draw.say(draw.rng.choice(field["values"])) for field in fields]
    filled, focused = draw.rng.randint(0, 4), draw.rng.random() < 0.5
    canvas = draw.canvas(draw.say(given["title"]))
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        top = TOP + 14 + 76 * number
        canvas.text((MARGIN, top + 8), label, 13, canvas.theme.faint)
        box = (MARGIN, top + 20, WIDTH - MARGIN, top + 60)
        canvas.entry(label, box, value if number < filled else "", "…", focused and number == filled)
    button = draw.say(given["button"])
    top = TOP + 26 + 76 * 4
    canvas.button(button, (MARGIN, top, WIDTH - MARGIN, top + 46), button)
    if focused and filled < 4:
        canvas.keyboard()
    title = draw.say(given["title"])
    listed = (", ", "，")[draw.language].join(f"{label}: {value}" for label, value in zip(labels, values, strict=True))
    task = (f"Fill in “{title}” with {listed}", f"填写“{title}”：{listed}")[draw.language]
    if filled == 4:
        reason = ("Everything is filled in.", "全部填好了。")[draw.language]
        return tapping(canvas, button, app, task, reason)
    label = labels[filled]
    if focused:
        reason = (f"The input of {label} is focused.", f"“{label}”输入框已激活。")[draw.language]
        return Step(canvas, app, task, reason, typed(values[filled]))
    reason = (f"{label} is empty: focus its input.", f"“{label}”为空，先点输入框。")[draw.language]
    return tapping(canvas, label, app, task, reason)


def home(draw: Writer) -> Step:
    """Icons of apps."""
    canvas, names = draw.bare(), draw.some("apps", draw.rng.choice((12, 16, 20)))
    for number, name in enumerate(names):
        left, top = 12 + 78 * (number % 4), 70 + 108 * (number // 4)
        canvas.add(name, (left, top, left + 78, top + 92))
        canvas.icon((left + 13, top + 4, left + 65, top + 56), draw.rng.randrange(30))
        canvas.text((left + 39, top + 74), name, 12, canvas.theme.ink, "mm")
    name = draw.rng.choice(names)
    task = (f"Open {name}.", f"打开{name}。")[draw.language]
    reason = (f"The icon of {name} is here.", f"{name}的图标在这里。")[draw.language]
    return tapping(canvas, name, ("System Home", "系统桌面")[draw.language], task, reason)


def dialog(draw: Writer) -> Step:
    """A question over a page."""
    given, app = draw.rng.choice(draw.words["dialogs"]), draw.some("apps", 1)[0]
    canvas = draw.canvas(app)
    for box in row_boxes(9):
        canvas.rectangle(box, canvas.theme.card)
    canvas.elements.clear()  # the question is over all of it
    top = draw.rng.randint(200, 420)
    canvas.rectangle((24, top, WIDTH - 24, top + 150), canvas.theme.page, 16, outline=canvas.theme.faint)
    canvas.text((WIDTH // 2, top + 44), draw.say(given["text"]), 15, canvas.theme.ink, "mm")
    yes, no = draw.say(given["accept"]), draw.say(given["decline"])
    canvas.button(no, (40, top + 90, 160, top + 132), no, filled=False)
    canvas.button(yes, (176, top + 90, WIDTH - 40, top + 132), yes)
    agreed = draw.rng.random() < 0.5
    want, chosen = draw.say(given["want" if agreed else "refuse"]), yes if agreed else no
    task = (f"{want[0].upper()}{want[1:]}.", f"{want}。")[draw.language]
    reason = (f"“{chosen}” does that.", f"点“{chosen}”。")[draw.language]
    return tapping(canvas, chosen, app, task, reason)


def shop(draw: Writer) -> Step:
    """Goods with prices, of which the one asked for may be further down."""
    app, count = draw.app("Market"), draw.rng.randint(5, 6)
    goods = draw.some("goods", count + 1)
    canvas = draw.canvas(app)
    cart = draw.phrase("cart")
    canvas.button(cart, (WIDTH - 84, STATUS_BAR + 10, WIDTH - MARGIN, STATUS_BAR + 42), cart, filled=False)
    for name, box in zip(goods[:count], row_boxes(count, height=92), strict=True):
        _, top, _, bottom = box
        canvas.rectangle(box, canvas.theme.card)
        canvas.icon((MARGIN, top + 14, MARGIN + 62, top + 76), draw.rng.randrange(30))
        canvas.text((MARGIN + 76, top + 32), name, 15, canvas.theme.ink)
        canvas.text((MARGIN + 76, top + 60), f"¥ {draw.rng.randint(3, 299)}.{draw.rng.randrange(10)}0", 13, "#c2571a")
        canvas.button(name, (WIDTH - 82, bottom - 52, WIDTH - MARGIN, bottom - 18), draw.phrase("add"))
    if draw.rng.random() < 0.2:
        reason = ("The cart is at the top.", "购物车在上方。")[draw.language]
        return tapping(canvas, cart, app, ("Open the cart.", "打开购物车。")[draw.language], reason)
    name = draw.rng.choice([*goods[:count], *[goods[count]] * 2])
    task = (f"Put into the cart: {name}", f"把{name}加入购物车。")[draw.language]
    if name == goods[count]:
        return looking_further(draw, canvas, name, app, task)
    reason = (f"The button beside {name} adds it.", f"点{name}旁边的按钮。")[draw.language]
    return tapping(canvas, name, app, task, reason)


def search(draw: Writer) -> Step:
    """A page to search in, or a page that has nothing to do with the task."""
    app, wanted = draw.app("Reader"), draw.some("searches", 1)[0]
    state = draw.rng.choice(("idle", "focused", "elsewhere"))
    title = draw.some("pages", 1)[0] if state == "elsewhere" else app
    canvas = draw.canvas(title)
    task = (f"Search for: {wanted}", f"搜索：{wanted}")[draw.language]
    if state == "elsewhere":
        for name, box in zip(draw.some("settings", 5), row_boxes(5), strict=True):
            canvas.rectangle(box, canvas.theme.card)
            canvas.text((MARGIN, (box[1] + box[3]) // 2), name, 15, canvas.theme.ink)
        reason = (f"“{title}” is the wrong page: go back.", f"“{title}”不是要找的页面，返回。")[draw.language]
        return Step(canvas, app, task, reason, 'do(action="Back")')
    hint = draw.phrase("search")
    canvas.entry("entry", (MARGIN, TOP + 6, WIDTH - MARGIN, TOP + 48), "", hint, state == "focused")
    for name, box in zip(draw.some("searches", 4), row_boxes(4, top=TOP + 64, height=56), strict=True):
        canvas.rectangle(box, canvas.theme.card)
        canvas.text((MARGIN, (box[1] + box[3]) // 2), name, 14, canvas.theme.faint)
    if state == "focused":
        canvas.keyboard()
        return Step(canvas, app, task, ("The input is focused.", "输入框已激活。")[draw.language], typed(wanted))
    return tapping(canvas, "entry", app, task, ("Focus the input first.", "先点输入框。")[draw.language])


KINDS: tuple[Callable[[Writer], Step], ...] = (settings, chats, conversation, form, home, dialog, shop, search)
