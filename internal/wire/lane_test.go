package wire

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

func TestLaneRequest(t *testing.T) {
	good := LaneRequest{Ticket: NewTicket(), Node: NewID(), Hops: 3, Via: []ID{NewID()}}
	b, err := json.Marshal(good)
	if err != nil {
		t.Fatal(err)
	}
	var got LaneRequest
	if err := DecodeJSON(strings.NewReader(string(b)), MaxLaneBody, &got); err != nil || got.Validate() != nil || got.Ticket != good.Ticket || got.Node != good.Node || got.Hops != 3 || got.Via[0] != good.Via[0] {
		t.Errorf("got %+v, %v, %v", got, err, got.Validate())
	}
	longest, err := json.Marshal(LaneRequest{Ticket: NewTicket(), Node: NewID(), Hops: MaxHops, Via: []ID{NewID(), NewID(), NewID(), NewID()}})
	if err != nil || len(longest) > MaxLaneBody/2 {
		t.Errorf("an honest request has %d bytes, %v", len(longest), err)
	}
	if s := fmt.Sprintf("%v %+v %#v %s", good.Ticket, good, good.Ticket, good.Ticket); strings.Contains(s, string(b[11:30])) || strings.Contains(s, fmt.Sprint(good.Ticket[0], " ", good.Ticket[1], " ", good.Ticket[2])) {
		t.Errorf("a ticket prints itself: %s", s)
	}
	for name, change := range map[string]func(*LaneRequest){
		"no ticket":            func(r *LaneRequest) { r.Ticket = Ticket{} },
		"negative hops":        func(r *LaneRequest) { r.Hops = -1 },
		"too many hops":        func(r *LaneRequest) { r.Hops = MaxHops + 1 },
		"a node that is no ID": func(r *LaneRequest) { r.Node = "127.0.0.1:22" },
		"long via":             func(r *LaneRequest) { r.Via = make([]ID, MaxHops+1) },
		"via that is no ID":    func(r *LaneRequest) { r.Via = []ID{"me"} },
	} {
		bad := good
		change(&bad)
		if bad.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzTicket(f *testing.F) {
	text, _ := NewTicket().MarshalText()
	f.Add(string(text))
	f.Add("")
	f.Add(strings.Repeat("A", 43))
	f.Add(strings.Repeat("_", 43))
	f.Fuzz(func(t *testing.T, s string) {
		var ticket Ticket
		if ticket.UnmarshalText([]byte(s)) != nil {
			if ticket != (Ticket{}) {
				t.Error("a refused ticket leaves something behind")
			}
			return
		}
		if back, _ := ticket.MarshalText(); string(back) != s || ticket == (Ticket{}) {
			t.Errorf("%q is read as another ticket: %q", s, back)
		}
	})
}
