.PHONY: help demo test check services prove chaos bench growth

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile

demo: ## kill a worker in mid-charge and count the charges; needs no server
	@sh scripts/demo

test: ## all tests; what this machine has no server for is skipped and named
	@sh scripts/test

check: ## format, lint, types, imports, the documents' examples
	@sh scripts/check

services: ## get the servers that the tests need
	@sh scripts/services

prove: ## go through every interleaving and crash point, and break the protocol to see it caught
	@sh scripts/prove

chaos: ## break workers, brokers and stores, and count what was lost: make chaos SECONDS=600 SEED=7
	@sh scripts/chaos $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

bench: ## measure calls beside the same by hand and beside peers; in five minutes: make bench QUICK=1
	@QUICK=$(QUICK) sh scripts/bench

growth: ## measure whether 10 million records are felt; in half a minute with fewer: make growth QUICK=1
	@QUICK=$(QUICK) sh scripts/growth
