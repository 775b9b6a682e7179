// Package run holds what every role of Ingot is made of: tasks that run side by
// side until one fails, a stack of clean-ups that undoes a half-done start, sockets
// that follow a killed process's, quotas of what clients may have in use, and the words
// that systemd is told.
// It starts no processes and knows no role.
package run

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"golang.org/x/sync/errgroup"
)

// Task is one long-lived part of a role.
type Task interface {
	// Run works until ctx ends, which is no error, or until it cannot go on.
	Run(ctx context.Context) error
	// Ready is closed once the task serves.
	Ready() <-chan struct{}
	// String is the task's name in logs and errors.
	String() string
}

// All runs the tasks until one of them ends or ctx does, then ends the others
// and waits for them. The error names the task that failed first.
func All(ctx context.Context, log *slog.Logger, tasks ...Task) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, task := range tasks {
		group.Go(func() error {
			err := task.Run(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if err == nil {
				return fmt.Errorf("%s ended", task)
			}
			return fmt.Errorf("%s: %w", task, err)
		})
		group.Go(func() error {
			select {
			case <-task.Ready():
				log.Info("ready", "task", task.String())
			case <-ctx.Done():
			}
			return nil
		})
	}
	return group.Wait()
}

// Func makes a task of a function, which calls ready once it serves.
func Func(name string, f func(ctx context.Context, ready func()) error) Task {
	return &function{name: name, f: f, ready: make(chan struct{})}
}

type function struct {
	name  string
	f     func(ctx context.Context, ready func()) error
	ready chan struct{}
	once  sync.Once
}

func (t *function) Run(ctx context.Context) error {
	return t.f(ctx, func() { t.once.Do(func() { close(t.ready) }) })
}

func (t *function) Ready() <-chan struct{} { return t.ready }

func (t *function) String() string { return t.name }

// Cleanup undoes, in reverse order, what was done so far:
//
//	var undo run.Cleanup
//	defer undo.Clean()
//	…
//	undo.Add(func() { … })
//	…
//	undo.Release() // all done: keep it
//
// It belongs to one goroutine.
type Cleanup struct{ undo []func() }

// Add puts one more step on the stack.
func (c *Cleanup) Add(f func()) { c.undo = append(c.undo, f) }

// Clean runs the steps, newest first, and forgets them.
func (c *Cleanup) Clean() {
	for i := len(c.undo) - 1; i >= 0; i-- {
		c.undo[i]()
	}
	c.undo = nil
}

// Release forgets the steps without running them.
func (c *Cleanup) Release() { c.undo = nil }
