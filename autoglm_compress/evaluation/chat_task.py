"""Multiple-choice questions with images or sounds as turns of a chat, for lm-eval."""

import json
from typing import Any

from datasets import Features, Value

from autoglm_compress.calibration.chat import Chat
from autoglm_compress.evaluation.folder_task import FEATURES, FolderTask, as_documents, dataset_of
from autoglm_compress.evaluation.questions import LETTERS, Question, Subject
from autoglm_compress.hashing import sha256

MEDIA_FEATURES = Features(
    {
        **FEATURES,
        "where": Value("string"),
        "media": [{"type": Value("string"), "path": Value("string"), "sha256": Value("string")}],
    }
)


class ChatPrompt(str):
    """A chat that ends where the model answers. As text it is its messages and the hashes of its files, as JSON."""

    chat: Chat

    @classmethod
    def of(cls, chat: Chat, hashes: list[str]) -> "ChatPrompt":
        """The prompt of a chat, with the hashes of its files."""
        prompt = cls(json.dumps([chat.messages, hashes], ensure_ascii=False))
        prompt.chat = chat
        return prompt


class ChatTask(FolderTask):
    """The questions of a subject with images or sounds, asked in the turns of a chat.

    Each worked example is a turn of the user and, as the answer, its letter. A turn begins with the images and sounds
    of the question; its text, and the description before the first, are as lm-eval writes them.
    """

    def __init__(self, subject: Subject, config: dict[str, Any]) -> None:
        self._subject = subject
        hashes = {file: sha256(file) for file in subject.files}
        splits = {"test": subject.questions, "dev": subject.examples}
        questions = {
            split: dataset_of(_documents(some, subject, hashes), MEDIA_FEATURES) for split, some in splits.items()
        }
        super().__init__(questions, config | {"target_delimiter": ""})

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **kwargs: Any) -> ChatPrompt:
        """The prompt of a question."""
        examples = [self.dataset["dev"][number] for number in range(num_fewshot)]
        messages: list[dict[str, Any]] = []
        for asked in (*examples, doc):
            opening = [] if messages else [{"type": "text", "text": self.config.description}]
            files = [{"type": each["type"], "path": each["path"]} for each in asked["media"]]
            content = [*opening, *files, {"type": "text", "text": self.doc_to_text(asked)}]
            messages += [
                {"role": "user", "content": content},
                {"role": "assistant", "content": LETTERS[asked["answer"]]},
            ]
        chat = Chat(messages[:-1], None, doc["where"], self._subject.folder, asks=True)
        return ChatPrompt.of(chat, [each["sha256"] for asked in (*examples, doc) for each in asked["media"]])


def _documents(questions: tuple[Question, ...], subject: Subject, hashes: dict[Any, str]) -> list[dict[str, Any]]:
    """Questions as lm-eval's documents, with their files within the subject's folder."""
    return [
        document
        | {
            "where": question.where,
            "media": [
                {"type": kind, "path": str(file.relative_to(subject.folder)), "sha256": hashes[file]}
                for kind, file in question.media
            ],
        }
        for document, question in zip(as_documents(questions, subject.name), questions, strict=True)
    ]
