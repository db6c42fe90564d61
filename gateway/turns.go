package gateway

import (
	linked "container/list"
	"net/netip"

	"sallyport/internal/wire"
)

// lateTurn: one turn in so many is for those that were slow before, also while
// others wait.
const lateTurn = 4

// turns are the pending parties that wait for a look by way of one first hop.
// Sources take turns, so that ten thousand strangers behind a few addresses do
// not keep a node behind another one waiting; a source that comes anew is next;
// and who let us wait before stands behind. What an RCP says of sources decides
// the order here and nothing else: it could let sessions hang itself.
type turns struct {
	fresh, late ring
	count       int // of turns taken
	n           int // parties
}

func (t *turns) add(source netip.Prefix, key wire.KeyHash, late bool) {
	t.n++
	if late {
		t.late.add(source, key, false)
		return
	}
	t.fresh.add(source, key, true)
}

func (t *turns) next() (key wire.KeyHash, ok bool) {
	if t.n == 0 {
		return "", false
	}
	t.n--
	t.count++
	first, second := &t.fresh, &t.late
	if t.count%lateTurn == 0 {
		first, second = second, first
	}
	if key, ok = first.next(); ok {
		return key, true
	}
	return second.next()
}

// siteOf is a source: an IPv4 address, or the /64 that IPv6 gives to one site.
// All that is unreadable is one.
func siteOf(source string) netip.Prefix {
	ap, err := netip.ParseAddrPort(source)
	if err != nil {
		return netip.Prefix{}
	}
	addr := ap.Addr().Unmap().WithZone("")
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	return netip.PrefixFrom(addr, bits).Masked()
}

// ring is a queue for each source, in the order in which sources have a turn.
type ring struct {
	order linked.List // of *sourceQueue
	bySrc map[netip.Prefix]*sourceQueue
}

type sourceQueue struct {
	source netip.Prefix
	keys   []wire.KeyHash
}

// add puts a party behind the others of its source. A source that is not there
// yet has the next turn, or the last one.
func (r *ring) add(source netip.Prefix, key wire.KeyHash, next bool) {
	q := r.bySrc[source]
	if q == nil {
		if r.bySrc == nil {
			r.bySrc = make(map[netip.Prefix]*sourceQueue)
		}
		q = &sourceQueue{source: source}
		r.bySrc[source] = q
		if next {
			r.order.PushFront(q)
		} else {
			r.order.PushBack(q)
		}
	}
	q.keys = append(q.keys, key)
}

func (r *ring) next() (wire.KeyHash, bool) {
	e := r.order.Front()
	if e == nil {
		return "", false
	}
	q, _ := e.Value.(*sourceQueue)
	key := q.keys[0]
	q.keys = q.keys[1:]
	if len(q.keys) > 0 {
		r.order.MoveToBack(e)
	} else {
		r.order.Remove(e)
		delete(r.bySrc, q.source)
	}
	return key, true
}
