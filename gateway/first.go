package gateway

import (
	"context"
	"time"

	"sallyport/internal/wire"
)

// firstTime bounds the first visit. A policy whose commands take longer is left
// to an ordinary one, so that others enrol meanwhile.
const firstTime = 10 * time.Second

// firstVisit claims the visit of a node that is about to get its certificate.
// visit does it in the session in which the node gets it: each side has proved
// in it what it would prove in the next, the node its key, the gateway its
// chain. The node comes back by its new channel up to date and known, so that
// this calls for no other session. end gives the claim back; without a visit
// that succeeded an ordinary one follows.
func (s *Server) firstVisit(node wire.Party) (visit func(ctx context.Context, rt endToEnd), end func()) {
	t, ok := s.fleet.beginFirst(node.ID)
	if !ok { // an ordinary visit is under way
		return func(context.Context, endToEnd) {}, func() {}
	}
	again := t.wants
	visit = func(ctx context.Context, rt endToEnd) {
		ctx, cancel := context.WithTimeout(ctx, firstTime)
		defer cancel()
		s.sessions.lend(node, rt, func() { again, _ = s.visit(ctx, t) })
	}
	return visit, func() { s.fleet.endFirst(node.ID, again) }
}

// beginFirst claims the visit of a node, so that its new channel does not ask
// for one.
func (f *fleet) beginFirst(id wire.ID) (t task, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil || !m.known || m.chores[choreVisit] {
		return task{}, false
	}
	m.chores[choreVisit], m.first = true, true
	return task{id: id, role: m.role, name: m.name, known: true, wants: wantHello | wantPush}, true
}

// endFirst gives it back, and again is wanted. What was asked for meanwhile
// waits a moment: its first signals may be from before it took what it was given.
func (f *fleet) endFirst(id wire.ID, again want) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil || !m.first {
		return // it was removed meanwhile
	}
	m.chores[choreVisit], m.first = false, false
	if again != 0 {
		f.askLocked(m, again)
	}
	if w := m.wants[choreVisit]; w != 0 && again == 0 {
		m.wants[choreVisit] = 0
		f.later(m, w, f.t.retryMin)
	}
}

// lend has what is asked of a party go through a session that somebody else
// opened, while fn runs; the session is closed then.
func (s *sessions) lend(party wire.Party, rt endToEnd, fn func()) {
	c := &conversation{party: party, since: time.Now(), rt: rt, users: 1}
	s.mu.Lock()
	if s.warm[party.ID] == nil && !s.closed {
		s.keepLocked(c)
	}
	s.unlock()
	fn()
	s.mu.Lock()
	defer s.unlock()
	s.removeLocked(c)
}
