-- The role and the database of the web processes, for docker-compose.yml: run at each start.
\getenv password ROLE_PASSWORD

-- Whatever fails here, the statement that has the password in it gets into no log.
SET log_statement = 'none';
SET log_min_error_statement = 'panic';
SET log_min_duration_statement = -1;
SET password_encryption = 'scram-sha-256';

SELECT 'CREATE ROLE demo' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'demo') \gexec
ALTER ROLE demo WITH LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD :'password';

SELECT 'CREATE DATABASE demo OWNER demo' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'demo') \gexec
REVOKE CONNECT, TEMPORARY ON DATABASE postgres FROM PUBLIC;
