package gateway

import (
	"fmt"
	"strings"
	"testing"

	"sallyport/internal/wire"
)

func turnKey(text string) wire.KeyHash {
	return wire.KeyHash(strings.Repeat("0", 64-len(text)) + text)
}

// Ten thousand strangers behind a few addresses do not keep a node that comes
// from elsewhere waiting.
func TestTurns(t *testing.T) {
	var q turns
	const addresses, each = 10, 1000
	for i := range addresses * each {
		q.add(siteOf(fmt.Sprintf("10.0.0.%d:1", i/each)), turnKey(fmt.Sprintf("%x", i+1)), false)
	}
	for range 7 {
		q.next()
	}
	honest := turnKey("beef00")
	q.add(siteOf("192.0.2.1:1"), honest, false)
	if got, ok := q.next(); !ok || got != honest {
		t.Errorf("next is %s, %v, want the one of another address", got, ok)
	}
	// Each address has its turn.
	seen := map[string]int{}
	for range 100 {
		key, ok := q.next()
		if !ok {
			t.Fatal("the queue is empty")
		}
		var i int
		if _, err := fmt.Sscanf(strings.TrimLeft(string(key), "0"), "%x", &i); err != nil {
			t.Fatal(key, err)
		}
		seen[fmt.Sprint((i-1)/each)]++
	}
	for a, n := range seen {
		if n < 5 || n > 15 {
			t.Errorf("address %s had %d of 100 turns", a, n)
		}
	}
	// Who was slow comes behind the others, but comes.
	slow := turnKey("510")
	q.add(siteOf("192.0.2.1:1"), slow, true)
	turn := 0
	for key := wire.KeyHash(""); key != slow; turn++ {
		var ok bool
		if key, ok = q.next(); !ok {
			t.Fatal("the slow one never had a turn")
		}
	}
	if turn > lateTurn {
		t.Errorf("the slow one had its turn after %d, want one in %d", turn, lateTurn)
	}
	// Nothing is lost.
	left := q.n
	for range left {
		if _, ok := q.next(); !ok {
			t.Fatal("a turn is missing")
		}
	}
	if _, ok := q.next(); ok || q.n != 0 {
		t.Errorf("%d are left", q.n)
	}
	if siteOf("[2001:db8::1]:1") != siteOf("[2001:db8::ffff:2]:9") || siteOf("[2001:db8::1]:1") == siteOf("[2001:db8:0:1::1]:1") || siteOf("junk") != siteOf("") {
		t.Error("sources are not told apart by address and /64")
	}
}
