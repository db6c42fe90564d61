package channel

import (
	"net"
	"net/netip"
	"sync"
)

// sources counts by source address, with a limit for each and for all: one
// IPv4 address is a source, and so is one IPv6 /64, which is what one host gets.
type sources struct {
	total, each int

	mu  sync.Mutex
	all int
	by  map[netip.Prefix]int
}

func newSources(total, each int) *sources {
	return &sources{total: total, each: each, by: map[netip.Prefix]int{}}
}

// enter counts one from addr, or tells that it is above a limit.
func (s *sources) enter(addr net.Addr) (leave func(), ok bool) {
	src := sourceOf(addr)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all >= s.total || s.by[src] >= s.each {
		return nil, false
	}
	s.all++
	s.by[src]++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.all--
		if s.by[src]--; s.by[src] == 0 {
			delete(s.by, src)
		}
	}), true
}

// busy tells whether a quarter is taken, of all or of what addr may have.
func (s *sources) busy(addr net.Addr) bool {
	src := sourceOf(addr)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all > s.total/4 || s.by[src] > s.each/4
}

// count is how many are in, from everywhere.
func (s *sources) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all
}

func sourceOf(addr net.Addr) netip.Prefix {
	ap, err := netip.ParseAddrPort(addr.String())
	if err != nil {
		return netip.Prefix{} // in memory: all of them are one source
	}
	ip := ap.Addr().Unmap().WithZone("")
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	p, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}
