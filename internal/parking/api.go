package parking

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/wire"
)

// API answers GET and POST of wire.PathParked in the sessions of one world. A
// nil lot has nothing to list.
func (l *Lot) API(world string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case l == nil:
			channel.Refuse(w, http.StatusNotFound, "no proxy for local clients listens here")
		case r.Method == http.MethodGet:
			l.list(w, r, world)
		case r.Method == http.MethodPost:
			l.takeRefusal(w, r, world)
		default:
			channel.Refuse(w, http.StatusMethodNotAllowed, "want GET or POST")
		}
	})
}

func (l *Lot) list(w http.ResponseWriter, r *http.Request, world string) {
	q := r.URL.Query()
	after, err := strconv.ParseInt(q.Get("after"), 10, 64)
	if err != nil && q.Has("after") {
		channel.Refuse(w, http.StatusBadRequest, "after is no number")
		return
	}
	var wait wire.Duration
	if q.Has("wait") {
		if wait, err = wire.ParseDuration(q.Get("wait")); err != nil {
			channel.Refuse(w, http.StatusBadRequest, "wait: "+err.Error())
			return
		}
	}
	ctx, cancel := context.WithTimeout(r.Context(), min(wait, wire.MaxParkedWait).Std()+time.Millisecond)
	defer cancel()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(wire.ParkedList{Parked: l.List(ctx, world, after)}) // the session died: it is asked again
}

func (l *Lot) takeRefusal(w http.ResponseWriter, r *http.Request, world string) {
	var v wire.ParkedRefusal
	if err := wire.DecodeJSON(r.Body, wire.MaxEnrollBody, &v); err != nil {
		channel.Refuse(w, http.StatusBadRequest, err.Error())
		return
	}
	switch err := l.Refuse(world, v); {
	case errors.Is(err, errGone):
		channel.Refuse(w, http.StatusNotFound, err.Error())
	case err != nil:
		channel.Refuse(w, http.StatusBadRequest, err.Error())
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}
