package gateway

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"sallyport/gateway/api"
	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

func (r *rest) eventRoutes() {
	op := func(id, method, path, summary string) huma.Operation {
		return huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary}
	}
	handle(r, op("event.list", http.MethodGet, "/events", "List events, newest first"), mayRead, r.listEvents)
	stream[tailInput, api.Event](r, op("event.tail", "", "/events/tail", "Follow events in the order of their positions"), mayRead, r.tailEvents)
	handle(r, op("event.show", http.MethodGet, "/events/{id}", "Show an event with its annotations"), mayRead, r.showEvent)
	handle(r, op("event.ack", http.MethodPost, "/events/{id}/ack", "Acknowledge an event"), mayOperate, r.ackEvent)
	handle(r, op("event.close", http.MethodPost, "/events/{id}/close", "Close an event"), mayOperate, r.closeEvent)
	handle(r, op("event.annotate", http.MethodPost, "/events/{id}/annotations", "Add a remark to an event"), mayOperate, r.annotateEvent)
}

// EventFilter selects events.
type EventFilter struct {
	Node     string `query:"node" maxLength:"256" doc:"Name, unique beginning or UUID."`
	Severity string `query:"severity" enum:"normal,warning,minor,major,critical"`
}

// node resolves the node of a filter; a node that was removed by its UUID.
func (r *rest) eventNode(ctx context.Context, ref string) (wire.ID, error) {
	if ref == "" {
		return "", nil
	}
	if n, err := r.s.store.AnyNode(ctx, wire.ID(ref)); err == nil {
		return n.ID, nil
	}
	n, err := r.node(ctx, ref, false)
	if err != nil {
		return "", err
	}
	return n.ID, nil
}

func eventView(e store.Event) api.Event {
	return api.Event{
		ID: e.ID, Pos: e.Pos, NodeID: e.NodeID, Node: e.Node, Spool: e.Spool, Seq: e.Seq, Time: utc(e.Time), Received: utc(e.ReceivedAt), Severity: e.Severity,
		Application: e.Application, Object: e.Object, Key: e.Key, Text: e.Text, Instance: e.Instance, State: e.State, Count: e.Count,
	}
}

type listEventsInput struct {
	Page
	EventFilter
	State  string    `query:"state" enum:"open,acknowledged,closed"`
	Key    string    `query:"key" maxLength:"1024"`
	Since  time.Time `query:"since" doc:"Received at or after this time."`
	Merged bool      `query:"merged" doc:"Also the events that were merged into another by their key."`
}

func (r *rest) listEvents(ctx context.Context, in *listEventsInput) (*body[api.List[api.Event]], error) {
	before, err := in.before()
	if err != nil {
		return nil, err
	}
	node, err := r.eventNode(ctx, in.Node)
	if err != nil {
		return nil, err
	}
	rows, err := r.s.store.Events(ctx, store.EventFilter{
		NodeID: node, Severity: wire.Severity(in.Severity), State: in.State, Key: in.Key, Since: in.Since, Merged: in.Merged, Before: before, Limit: in.Limit + 1,
	})
	if err != nil {
		return nil, err
	}
	return answer(positions(rows, in.Limit, eventView, func(e store.Event) int64 { return e.Pos })), nil
}

type tailInput struct {
	EventFilter
	After int64 `query:"after" default:"-1" doc:"Begin after this position; without it, with the next event to come."`
}

// tailPage is the number of events that a tail reads at once.
const tailPage = 500

// tailEvents reads the database from position to position: what woke it says
// only that there is something new.
func (r *rest) tailEvents(ctx context.Context, in *tailInput) (func(context.Context, sendFunc) error, error) {
	node, err := r.eventNode(ctx, in.Node)
	if err != nil {
		return nil, err
	}
	wakes, cancel := r.s.bus.Subscribe(bus.Events)
	after := in.After
	if after < 0 {
		if after, err = r.s.store.Position(ctx); err != nil {
			cancel()
			return nil, err
		}
	}
	return func(ctx context.Context, send sendFunc) error {
		defer cancel()
		for {
			rows, err := r.s.store.Events(ctx, store.EventFilter{NodeID: node, Severity: wire.Severity(in.Severity), Merged: true, Ascending: true, After: after, Limit: tailPage})
			if err != nil {
				return err
			}
			for _, e := range rows {
				if err := send(eventView(e)); err != nil {
					return err
				}
				after = e.Pos
			}
			if len(rows) == tailPage {
				continue
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-wakes:
			}
		}
	}, nil
}

// event finds the event that a reference means: its ID or a beginning of it.
func (r *rest) event(ctx context.Context, ref string, changing bool) (store.Event, error) {
	found, err := r.s.store.FindEvents(ctx, ref, 10)
	if err != nil {
		return store.Event{}, err
	}
	return pick("event", ref, changing, found, func(e store.Event) (string, string) { return string(e.ID), "" })
}

func (r *rest) showEvent(ctx context.Context, in *ByID) (*body[api.EventDetail], error) {
	e, err := r.event(ctx, in.ID, false)
	if err != nil {
		return nil, err
	}
	notes, err := r.s.store.Annotations(ctx, e.ID)
	if err != nil {
		return nil, err
	}
	d := api.EventDetail{Event: eventView(e), Annotations: []api.Annotation{}, ChangedBy: e.ChangedBy, Changed: when(e.ChangedAt)}
	for _, n := range notes {
		d.Annotations = append(d.Annotations, api.Annotation{Time: utc(n.Time), By: n.ByWhom, Text: n.Text})
	}
	return answer(d), nil
}

// changeEvent changes an event and shows it as it is then.
func (r *rest) changeEvent(ctx context.Context, ref, what, detail string, f func(ctx context.Context, tx *store.Tx, e store.Event) error) (*body[api.EventDetail], error) {
	e, err := r.event(ctx, ref, true)
	if err != nil {
		return nil, err
	}
	err = r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		now, err := tx.FindEvents(ctx, string(e.ID), 1) // another caller may have changed it meanwhile
		if err != nil {
			return err
		}
		if len(now) == 0 || now[0].ID != e.ID {
			return notFound("event", ref, true)
		}
		tx.Audit(ctx, what, "event "+string(e.ID), detail)
		return f(ctx, tx, now[0])
	})
	if err != nil {
		return nil, err
	}
	return r.showEvent(ctx, &ByID{ID: string(e.ID)})
}

func (r *rest) ackEvent(ctx context.Context, in *ByID) (*body[api.EventDetail], error) {
	return r.changeEvent(ctx, in.ID, "event.ack", "", func(ctx context.Context, tx *store.Tx, e store.Event) error {
		if e.State == api.EventClosed {
			return api.NewProblem(api.CodeConflict, fmt.Sprintf("event %s is closed", e.ID.Short()))
		}
		return tx.SetEventState(ctx, e.ID, api.EventAcknowledged)
	})
}

func (r *rest) closeEvent(ctx context.Context, in *ByID) (*body[api.EventDetail], error) {
	return r.changeEvent(ctx, in.ID, "event.close", "", func(ctx context.Context, tx *store.Tx, e store.Event) error {
		return tx.SetEventState(ctx, e.ID, api.EventClosed)
	})
}

type annotateInput struct {
	ByID
	Body api.Annotate
}

// maxAnnotation bounds a remark, in bytes.
const maxAnnotation = 8 << 10

func (r *rest) annotateEvent(ctx context.Context, in *annotateInput) (*body[api.EventDetail], error) {
	text := strings.TrimSpace(in.Body.Text)
	if text == "" || len(text) > maxAnnotation {
		return nil, api.NewProblem(api.CodeInvalid, fmt.Sprintf("a remark has 1 to %d bytes", maxAnnotation))
	}
	return r.changeEvent(ctx, in.ID, "event.annotate", wire.Quotable(text), func(ctx context.Context, tx *store.Tx, e store.Event) error {
		tx.Annotate(ctx, e.ID, text)
		return nil
	})
}
