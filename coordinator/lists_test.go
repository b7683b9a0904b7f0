package coordinator

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// A job over lists of arguments has a task for each, also if they fill several records, and
// after a restart.
func TestAJobOverListsOfArgumentsHasAResultOfEach(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := openWith(t, dir, hurried)
	lists := make([][]string, 60)
	for i := range lists {
		lists[i] = []string{strconv.Itoa(i), strings.Repeat("\x01 ", 5000)} // a byte that JSON makes six of
	}
	lists[7] = nil
	q := api.JobSpec{Module: w.module(t), Args: []string{"first"}, Over: &api.JobOver{Args: lists}, Verify: api.VerifyNone}
	j, err := w.op.StartJob(testContext(t), q)
	must(t, err)
	if kept, err := w.jobs.files.find(testContext(t), j.ID); err != nil || kept.Rest == 0 {
		t.Errorf("all of it is in one record, so this shows nothing: %v", err)
	}
	if j.Tasks != len(lists) || len(j.Spec.Over.Args) != 0 {
		t.Errorf("%d tasks, %d lists in the job itself", j.Tasks, len(j.Spec.Over.Args))
	}
	w.Close()
	w = openWith(t, dir, hurried)
	t.Cleanup(w.Close)
	w.devices(t, 3)
	got := w.gather(t, j.ID)
	if len(got) != len(lists) {
		t.Errorf("%d results of %d lists", len(got), len(lists))
	}
	for i, args := range lists {
		want, _ := toyCompute(context.Background(), []byte("module"), slices.Concat(q.Args, args), nil)
		r := got[strconv.Itoa(i+1)]
		if r.Err() != nil || string(r.Output) != string(want) || !slices.Equal(r.Args, args) || r.Task != i {
			t.Errorf("list %d: %v %q %+.100q", i, r.Err(), r.Output, fmt.Sprint(r.JobTask))
		}
	}
}

func TestListsOfArgumentsAreBounded(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	w.devices(t, 1)
	w.putFile(t, "job", someBytes(100), 1)
	module := w.module(t)
	long := strings.Repeat("x", api.MaxSpecText/2)
	for _, bad := range []struct {
		q      api.JobSpec
		status int
		code   string
	}{
		{api.JobSpec{Over: &api.JobOver{Args: make([][]string, api.MaxTasks+1)}}, http.StatusRequestEntityTooLarge, "too_large"},
		{api.JobSpec{Args: []string{long}, Over: &api.JobOver{Args: [][]string{{"x"}, {"x", long}}}}, http.StatusRequestEntityTooLarge, "too_large"},
		{api.JobSpec{Over: &api.JobOver{Args: slices.Repeat([][]string{{long}}, api.MaxArgsText/len(long)+1)}}, http.StatusRequestEntityTooLarge, "too_large"},
		{api.JobSpec{Over: &api.JobOver{Args: slices.Repeat([][]string{{long}}, 2*maxJob/len(long))}}, http.StatusBadRequest, wire.CodeBadBody},
		{api.JobSpec{Over: &api.JobOver{Args: [][]string{{"x"}}, Names: []string{"job"}}}, http.StatusBadRequest, "bad_job"},
		{api.JobSpec{Over: &api.JobOver{Args: [][]string{{"x"}}, PerChunk: true}}, http.StatusBadRequest, "bad_job"},
		{api.JobSpec{Over: &api.JobOver{Args: [][]string{{"x"}}}, Save: map[string]string{"stdout": "one"}}, http.StatusBadRequest, "bad_job"},
	} {
		bad.q.Module = module
		_, err := w.op.StartJob(testContext(t), bad.q)
		wantRefusal(t, err, bad.status, bad.code)
	}
	// What all tasks read may be standard input.
	q := input(module, "job")
	q.Over = &api.JobOver{Args: [][]string{{"a"}, {"b"}}}
	j, err := w.op.StartJob(testContext(t), q)
	must(t, err)
	if got := w.gather(t, j.ID); got["1"].Err() != nil || got["2"].Err() != nil {
		t.Errorf("%+v", got)
	}
}
