package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"

	"github.com/danielgtaylor/huma/v2"

	"sallyport/gateway/api"
	"sallyport/gateway/manifest"
	"sallyport/gateway/store"
	"sallyport/internal/selector"
)

// huma makes its own errors (validation, unknown paths) through this variable,
// which is how it wants to be told of another type.
func init() {
	huma.NewError = func(status int, message string, errs ...error) huma.StatusError {
		p := api.NewProblem(codeOf(status), message)
		p.Status, p.Title = status, http.StatusText(status)
		for _, err := range errs {
			var d huma.ErrorDetailer
			switch {
			case err == nil:
			case errors.As(err, &d):
				p.Errors = append(p.Errors, api.ProblemError{Location: d.ErrorDetail().Location, Message: d.ErrorDetail().Message})
			default:
				p.Errors = append(p.Errors, api.ProblemError{Message: err.Error()})
			}
		}
		return p
	}
	huma.NewErrorWithContext = func(ctx huma.Context, status int, message string, errs ...error) huma.StatusError {
		err := huma.NewError(status, message, errs...)
		switch status { // what huma says before an operation is reached
		case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity:
			if p, ok := errors.AsType[*api.Problem](err); ok {
				tellRefused(ctx, p)
			}
		}
		return err
	}
}

// refusedKey is of a function that hears why a changing call does not reach its
// operation.
type refusedKey struct{}

// tellRefused tells whoever wants to hear it.
func tellRefused(ctx huma.Context, p *api.Problem) {
	if refused, ok := ctx.Context().Value(refusedKey{}).(func(*api.Problem)); ok {
		refused(p)
	}
}

func codeOf(status int) api.Code {
	for _, c := range []api.Code{
		api.CodeMalformed, api.CodeUnauthorized, api.CodeForbidden, api.CodeNotFound, api.CodeMethod, api.CodeConflict,
		api.CodeChanged, api.CodeTooLarge, api.CodeInvalid, api.CodeLocked, api.CodeUnavailable, api.CodeTimeout,
	} {
		if c.Status() == status {
			return c
		}
	}
	if status < http.StatusInternalServerError {
		return api.CodeMalformed
	}
	return api.CodeInternal
}

// problem turns an error into what the caller is told. What nobody foresaw is
// logged and told without details.
func (r *rest) problem(ctx context.Context, what string, err error) *api.Problem {
	var p *api.Problem
	var faults manifest.Errors
	var refused *statusError
	var unissued *notIssued
	is := func(targets ...error) bool {
		return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
	}
	switch {
	case errors.As(err, &p):
		return p
	case errors.As(err, &faults):
		p = api.NewProblem(api.CodeInvalid, "the documents have faults; nothing was changed")
		for _, f := range faults {
			p.Errors = append(p.Errors, api.ProblemError{Location: f.Pos.String(), Message: f.Message})
		}
		return p
	case is(store.ErrNotFound, ErrUnknownNode):
		return api.NewProblem(api.CodeNotFound, err.Error())
	case is(store.ErrExists):
		return api.NewProblem(api.CodeExists, err.Error())
	case is(store.ErrChanged):
		return api.NewProblem(api.CodeChanged, err.Error())
	case is(ErrNotConnected):
		return api.NewProblem(api.CodeUnavailable, err.Error())
	case is(errAway), errors.As(err, &unissued): // which is for those who watch this gateway as well
		r.log.Error("api call failed", "operation", what, "object", objectFrom(ctx), "error", err)
		return api.NewProblem(api.CodeUnavailable, err.Error())
	case errors.As(err, &refused): // by the party, which says why
		if refused.Status < http.StatusInternalServerError {
			return api.NewProblem(api.CodeConflict, err.Error())
		}
		return api.NewProblem(api.CodeUnavailable, err.Error())
	case is(store.ErrFull): // the database has logged it
		return api.NewProblem(api.CodeUnavailable, "the gateway stored nothing: "+store.ErrFull.Error())
	case is(selector.ErrEmpty):
		return api.NewProblem(api.CodeInvalid, err.Error())
	case is(context.DeadlineExceeded):
		return api.NewProblem(api.CodeTimeout, err.Error())
	case ctx.Err() != nil:
		return api.NewProblem(api.CodeTimeout, "the caller went away")
	}
	r.log.Error("api call failed", "operation", what, "object", objectFrom(ctx), "error", err)
	return api.NewProblem(api.CodeInternal, "the gateway failed at this; its log says why")
}

// writeProblem answers where no operation is known yet.
func writeProblem(w http.ResponseWriter, p *api.Problem) {
	w.Header().Set("Content-Type", p.ContentType(""))
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p) // the caller may be gone
}
