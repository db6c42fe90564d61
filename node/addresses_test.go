package node

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/wire"
)

func rcps(addrs ...string) []wire.RCPAddresses {
	return []wire.RCPAddresses{{Name: "r", Addresses: addrs}}
}

// TestRCPList: a new list is tried beside the old one, kept when it works, and
// dropped when it does not.
func TestRCPList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		open := func() *addresses {
			t.Helper()
			a, err := openAddresses(dir)
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
		a := open()
		if a.unlisted("join:1") {
			t.Error("before there is a list, it says nothing")
		}
		join := []string{"join:1"}
		want := func(addrs ...string) {
			t.Helper()
			if got := a.all(join); fmt.Sprint(got) != fmt.Sprint(addrs) {
				t.Errorf("dials %v, want %v", got, addrs)
			}
		}
		offer := func(change bool, live []string, addrs ...string) {
			t.Helper()
			changed, err := a.offer(rcps(addrs...), live)
			if err != nil || changed != change {
				t.Errorf("offer: %v, %v", changed, err)
			}
		}
		offer(true, nil, "a:1", "b:1")
		want("a:1", "b:1", "join:1")
		offer(false, nil, "b:1", "a:1")
		if changed, err := a.reached("b:1"); !changed || err != nil {
			t.Errorf("reached: %v, %v", changed, err)
		}
		a = open()
		want("a:1", "b:1", "join:1")
		for addr, unlisted := range map[string]bool{"a:1": false, "join:1": true} {
			if a.unlisted(addr) != unlisted {
				t.Errorf("%s is not in the gateway's list: %t, want %t", addr, !unlisted, unlisted)
			}
		}
		// A list that leads nowhere.
		offer(true, []string{"a:1"}, "wrong:1")
		want("a:1", "b:1", "join:1", "wrong:1")
		if dropped, next, err := a.expire(); dropped != nil || next <= 0 || err != nil {
			t.Errorf("expire: %v, %v, %v", dropped, next, err)
		}
		time.Sleep(trialTime)
		if dropped, _, err := a.expire(); fmt.Sprint(dropped) != "[wrong:1]" || err != nil {
			t.Errorf("expire: %v, %v", dropped, err)
		}
		want("a:1", "b:1", "join:1")
		offer(false, nil, "wrong:1") // the same again is not tried again
		offer(false, nil)            // an empty list says nothing
		want("a:1", "b:1", "join:1")
		// A list with an address that is connected already is good at once.
		offer(true, []string{"b:1"}, "b:1", "c:1")
		want("b:1", "c:1", "join:1")
		if _, next, _ := a.expire(); next != 0 {
			t.Error("a trial is under way")
		}
		// Back to the good list while another is on trial.
		offer(true, nil, "d:1")
		offer(true, nil, "b:1", "c:1")
		want("b:1", "c:1", "join:1")
	})
}
