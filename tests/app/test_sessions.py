"""What the server remembers of each window."""

from __future__ import annotations

from app.sessions import Sessions


def test_each_window_has_its_own_value():
    sessions = Sessions(list)
    sessions.put("a", [1])
    sessions.put("b", [2])
    assert (sessions.get("a"), sessions.get("b"), sessions.get("c")) == ([1], [2], [])


def test_who_says_not_who_it_is_shares_nothing():
    sessions = Sessions(list)
    sessions.put(None, [1])
    assert sessions.get(None) == []


def test_what_was_begun_anew_meanwhile_stays_so():
    sessions: Sessions[list] = Sessions(list)
    asked = sessions.get("a")
    assert sessions.replace("a", asked, grown := [1])
    sessions.put("a", [])  # a new conversation
    assert not sessions.replace("a", grown, [1, 2])
    assert sessions.get("a") == []
    assert sessions.replace(None, [], [3])
    assert not sessions.replace("b", asked, [4])


def test_windows_not_used_for_the_longest_time_are_forgotten():
    sessions = Sessions(int, most=2)
    sessions.put("a", 1)
    sessions.put("b", 2)
    assert sessions.get("a") == 1  # so b is the older one now
    sessions.put("c", 3)
    assert [sessions.get(name) for name in "acb"] == [1, 3, 0]
