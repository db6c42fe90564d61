package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"sallyport/internal/local"
	"sallyport/internal/wire"
)

// pull is a gateway's side of one outbox.
type pull struct {
	t     *testing.T
	down  *io.PipeWriter
	lines *wire.LineReader
	state wire.OutboxState
}

func (ag *agent) outbox() *pull {
	t := ag.p.t
	t.Helper()
	r, w := io.Pipe()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	req, err := http.NewRequestWithContext(ctx, "POST", "http://peer"+wire.PathOutbox, r)
	if err != nil {
		t.Fatal(err)
	}
	res, err := ag.session().RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = w.Close(); _ = res.Body.Close() })
	p := &pull{t: t, down: w, lines: wire.NewLineReader(res.Body, wire.MaxFrameLine)}
	st := p.next().State
	if st == nil {
		t.Fatal("the first line is no state")
	}
	p.state = *st
	return p
}

func (p *pull) next() (up wire.OutboxUp) {
	p.t.Helper()
	if err := p.lines.Next(&up); err != nil {
		p.t.Fatal(err)
	}
	return up
}

func (p *pull) send(d wire.OutboxDown) {
	p.t.Helper()
	b, err := json.Marshal(d)
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err := p.down.Write(append(b, '\n')); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pull) watermark(seq int64) {
	p.t.Helper()
	p.send(wire.OutboxDown{Watermark: &wire.OutboxMark{Spool: p.state.Spool, Seq: seq}})
}

func (p *pull) ack(seq int64) {
	p.t.Helper()
	p.send(wire.OutboxDown{Ack: &wire.OutboxMark{Spool: p.state.Spool, Seq: seq}})
}

func (ag *agent) emit(text string) {
	ag.p.t.Helper()
	if _, err := ag.a.SendEvent(ag.p.t.Context(), local.EventRequest{Severity: wire.SeverityMinor, Text: text}); err != nil {
		ag.p.t.Fatal(err)
	}
}

func TestOutbox(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	for i := range 3 {
		ag.emit(fmt.Sprint(i))
	}
	o := ag.outbox()
	if o.state.Depth != 3 || o.state.Next != 4 {
		t.Errorf("state %+v", o.state)
	}
	o.watermark(0)
	for i := range 3 {
		if e := o.next().Event; e == nil || e.Seq != int64(i+1) || e.Text != fmt.Sprint(i) {
			t.Fatalf("event %+v", e)
		}
	}
	o.ack(2)
	ag.emit("live")
	if e := o.next().Event; e == nil || e.Seq != 4 || e.Text != "live" {
		t.Fatalf("event %+v", e)
	}
	depth := func(n int64) func() bool {
		return func() bool { st, err := ag.in().spool.State(); return err == nil && st.Depth == n }
	}
	eventually(t, "two are left", depth(2))
	// The gateway ends its side; the node ends cleanly.
	if err := o.down.Close(); err != nil {
		t.Fatal(err)
	}
	var up wire.OutboxUp
	if err := o.lines.Next(&up); !errors.Is(err, io.EOF) {
		t.Errorf("end of stream: %v", err)
	}
	// After a restart the rest comes with the same places.
	ag = ag.restart()
	o = ag.outbox()
	o.watermark(2)
	if e := o.next().Event; e == nil || e.Seq != 3 {
		t.Errorf("event %+v", e)
	}
	if e := o.next().Event; e == nil || e.Seq != 4 {
		t.Errorf("event %+v", e)
	}
	o.ack(4)
	eventually(t, "all are delivered", depth(0))
	// A second outbox takes over; the first ends.
	second := ag.outbox()
	second.watermark(4)
	if err := o.lines.Next(&up); err == nil {
		t.Error("the older outbox goes on")
	}
	// A gateway that has seen more than this spool ever had: a new spool.
	ag.emit("kept")
	third := ag.outbox()
	third.watermark(1000)
	st := third.next().State
	if st == nil || st.Spool == third.state.Spool || st.First != 1 {
		t.Fatalf("state %+v", st)
	}
	if e := third.next().Event; e == nil || e.Seq != 1 || e.Text != "kept" {
		t.Errorf("event %+v", e)
	}
	third.state = *st
	third.watermark(0) // the gateway answers the second state too
	third.ack(1)
	eventually(t, "all are delivered", depth(0))
}

// TestOutboxGarbage: what a broken gateway sends ends its stream only.
func TestOutboxGarbage(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	ag.emit("x")
	for name, bad := range map[string]string{
		"no JSON": "hello\n", "an ack first": `{"ack":{"spool":"x","seq":1}}` + "\n", "another spool": `{"watermark":{"spool":"x","seq":0}}` + "\n",
		"negative": `{"watermark":{"spool":"SPOOL","seq":-5}}` + "\n", "ack of what was not sent": `{"watermark":{"spool":"SPOOL","seq":0}}` + "\n" + `{"ack":{"spool":"SPOOL","seq":99}}` + "\n",
	} {
		o := ag.outbox()
		if _, err := o.down.Write(bytes.ReplaceAll([]byte(bad), []byte("SPOOL"), []byte(o.state.Spool))); err != nil {
			t.Fatal(err)
		}
		for {
			var up wire.OutboxUp
			if err := o.lines.Next(&up); err != nil {
				break
			}
			if up.Event == nil {
				t.Errorf("%s: %+v", name, up)
			}
		}
	}
	if st, err := ag.in().spool.State(); err != nil || st.Depth != 1 {
		t.Errorf("state %+v, %v", st, err)
	}
}
