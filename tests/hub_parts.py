"""Parts of the stand-in for the Hub: how it lists files, and its collections."""

import hashlib
import json

LFS_SUFFIXES = (".safetensors", ".parquet", ".png")


def list_file(path: str, raw: bytes) -> dict:
    oid = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
    entry = {"type": "file", "path": path, "size": len(raw), "oid": oid}
    if path.endswith(LFS_SUFFIXES):
        lfs = {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 130}
        entry["lfs"] = lfs
    return entry


def list_folder(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}


class Collections:
    """What a handler of the stand-in does with collections, kept by their slug."""

    ROUTES = [
        ("POST", r"/api/collections", "make_collection"),
        ("GET", r"/api/collections/([^/]+/[^/]+)", "show_collection"),
        ("POST", r"/api/collections/([^/]+/[^/]+)/items", "add_to_collection"),
    ]

    def make_collection(self) -> None:
        if not self.allowed():
            return self.answer(401, {"error": "Invalid username or password."})
        asked = json.loads(self.body)
        name = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}"
        slug = f"{name}-{hashlib.sha1(name.encode()).hexdigest()[:24]}"
        if slug in self.hub.collections:
            return self.answer(409, {"error": "it exists", "slug": slug})
        self.hub.collections[slug] = {
            **{"slug": slug, "title": asked["title"], "owner": {"name": asked["namespace"]}},
            **{"items": [], "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0},
            **{"private": asked["private"], "theme": "green", "upvotes": 0},
        }
        self.show_collection(slug)

    def show_collection(self, slug: str) -> None:
        found = self.hub.collections.get(slug)
        self.answer(404, {"error": "not found"}) if found is None else self.answer(200, found)

    def add_to_collection(self, slug: str) -> None:
        if not self.allowed():
            return self.answer(401, {"error": "Invalid username or password."})
        asked, items = json.loads(self.body), self.hub.collections[slug]["items"]
        if any(item["id"] == asked["item"]["id"] for item in items):
            return self.answer(409, {"error": "it is there"})
        note = {"text": asked.get("note", ""), "html": ""}
        items.append(asked["item"] | {"_id": str(len(items)), "position": 0, "note": note})
        self.show_collection(slug)
